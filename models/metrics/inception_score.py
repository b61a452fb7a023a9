"""Inception score: how sure a classifier is of each image, and how many classes it sees in all of them.

Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved Techniques for Training GANs", 2016 (arXiv 1606.03498,
§4):

    IS = exp( mean over images of KL( p(y|x) || p(y) ) ),   p(y) = mean over images of p(y|x)

computed of ten parts of the images; the value is their mean, the spread their standard deviation. As in the authors'
code part i has the rows i N // 10 to (i + 1) N // 10, and the deviation is that of the ten values themselves (not over
9). 1: every image is taken for the same; K: each is certain, and all K classes come alike.

N matters. A part of n images scores at most min(K, n), and the fewer it has the lower: the literature has 50,000
images. Some codes do not split; then it is a few percent higher.

Pitfalls: images in the order of their classes make parts of one class each, and a score of 1: shuffle what is sorted.
The score never sees a real image, and knows nothing of the variety within a class. The paper's classifier is the
Inception network of 2015-12-05 with 1,008 outputs *without* their bias; any other one gives other numbers, and a
classifier of K classes no more than K.

Deviation: 0 log 0 is 0 here, where the authors' code has a nan.

Shape legend: N images, K classes. Everything is computed in float64.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

SPLITS = 10
_SUM = 1e-3  # how far the probabilities of one image may be from 1 together: bfloat16 has eight bits


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Logits (N, K) -> (mean, standard deviation) over parts."""
    return score_of_probabilities(torch.softmax(logits.double(), dim=-1), splits)


def score_of_probabilities(probabilities: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """p(y|x), (N, K), rows of sum 1 -> (mean, standard deviation) over parts of the rows as they stand."""
    if probabilities.ndim != 2 or not 1 <= splits <= len(probabilities):
        raise ValueError(f"{splits} part(s) of probabilities (N, K) are scored, not of {tuple(probabilities.shape)}")
    p = probabilities.double()
    if not ((p >= 0).all() and ((p.sum(dim=1) - 1).abs() < _SUM).all()):
        raise ValueError("the probabilities of an image are not numbers >= 0 that sum to 1")
    scores = torch.stack([_score(part) for part in _parts(p, splits)])
    return float(scores.mean()), float(scores.std(correction=0))


def protocol(splits: int = SPLITS) -> str:
    """All that a value depends on besides the probabilities and their order."""
    return f"is-1 splits={splits}"


def _parts(rows: Tensor, splits: int) -> list[Tensor]:
    bounds = [i * len(rows) // splits for i in range(splits + 1)]
    return [rows[first:end] for first, end in pairwise(bounds)]


def _score(p: Tensor) -> Tensor:
    """(n, K) -> exp of the mean divergence, a scalar."""
    of_all = p.mean(dim=0)
    divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, of_all)
    return divergence.sum(dim=1).mean().exp()
