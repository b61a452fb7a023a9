"""What the codes of images say about the factors that the images were made from, and categories about classes.

Continuous codes against known factors:

    correlation |r|, of values (Pearson) or of ranks (Spearman); which code became which factor
    MIG = mean over factors v of (I(c_1; v) - I(c_2; v)) / H(v),   c_1, c_2: the two codes that say most about v

(mutual information gap: Chen, Li, Grosse, Duvenaud, "Isolating Sources of Disentanglement in Variational Autoencoders",
2018, arXiv 1802.04942). 1: each factor is told whole by one code and not at all by another; 0: no code says
more than another one, be it everything or nothing.

Categories against classes: the accuracy after each category is mapped to the class that most of its images are of
(Chen et al., "InfoGAN", 2016, arXiv 1606.03657, section 7.2); the same with a class of its own for each category; and
normalised mutual information.

Deviation from the 2018 paper: it integrates over the encoder's distribution of a code; here a code is one number an
image, and I and H come from histograms of BINS bins of equal width between the least and the greatest value. N images
give two independent codes about (BINS - 1)^2 / 2N nats that are not there (0.09 at N = 2,000; H is at most 3.0).

Shape legend: N images, K codes, F factors, C categories, L classes. Everything is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 20


def correlation(codes: Tensor, factors: Tensor) -> Tensor:
    """(N, K), (N, F) -> |Pearson's r|, float64 (K, F); 0 where a column is constant."""
    codes, factors = _columns(codes, factors)
    a, b = (x - x.mean(dim=0) for x in (codes, factors))
    scale = a.norm(dim=0)[:, None] * b.norm(dim=0)
    varies = (_varies(codes)[:, None] & _varies(factors)) & (scale > 0)
    return torch.where(varies, (a.T @ b).abs() / scale, 0.0).clamp(max=1.0)


def rank_correlation(codes: Tensor, factors: Tensor) -> Tensor:
    """(N, K), (N, F) -> |Spearman's rho|, float64 (K, F): 1 for any monotone relation, straight or not."""
    codes, factors = _columns(codes, factors)
    return correlation(_ranks(codes), _ranks(factors))


def best_assignment(strength: Tensor) -> list[int | None]:
    """(K, F), all >= 0 -> for each factor the code that became it, a code for one factor at most.

    Of all such choices the one of the greatest sum; of equal ones the one of the earlier codes. None where there are
    fewer codes than factors. Takes K * 2^F steps: for tens of codes and about ten factors.
    """
    codes, factors = strength.shape
    values: list[list[float]] = strength.tolist()
    best: dict[int, tuple[float, list[int | None]]] = {
        0: (0.0, [None] * factors)
    }  # by the set of factors that have one
    for code in range(codes):
        for served, (total, chosen) in list(best.items()):
            for factor in range(factors):
                also = served | 1 << factor
                if also != served and (also not in best or total + values[code][factor] > best[also][0]):
                    best[also] = total + values[code][factor], [*chosen[:factor], code, *chosen[factor + 1 :]]
    full = [entry for served, entry in best.items() if served.bit_count() == min(codes, factors)]
    return max(full, key=lambda entry: entry[0])[1]


def mutual_information(codes: Tensor, factors: Tensor, bins: int = BINS) -> Tensor:
    """(N, K), (N, F) -> I in nats, float64 (K, F)."""
    codes, factors = _columns(codes, factors)
    a, b = _binned(codes, bins), _binned(factors, bins)
    pairs = [[information(table(x, y, bins, bins)) for y in b.T] for x in a.T]
    return torch.tensor(pairs, dtype=torch.float64).view(a.shape[1], b.shape[1])


def mutual_information_gap(codes: Tensor, factors: Tensor, bins: int = BINS) -> Tensor:
    """(N, K), (N, F) -> the gap of each factor, float64 (F,); MIG is its mean. A second code that is not there says 0.

    `ValueError` where a factor is constant: it has no entropy to tell."""
    codes, factors = _columns(codes, factors)
    told_whole = [entropy(torch.bincount(column)) for column in _binned(factors, bins).T]
    entropies = torch.tensor(told_whole, dtype=torch.float64)
    if (entropies == 0).any():
        raise ValueError(f"factor {int((entropies == 0).nonzero()[0])} is the same in all {len(factors)} images")
    told = torch.cat([mutual_information(codes, factors, bins), torch.zeros(1, factors.shape[1], dtype=torch.float64)])
    first, second = told.topk(2, dim=0).values
    return (first - second) / entropies


def majority_classes(categories: Tensor, labels: Tensor) -> Tensor:
    """int (N,) twice -> int64 (C,): the class that most images of each category are of; the lower one of equal ones.

    -1 for a category without images, of those below the greatest."""
    counts = table(categories, labels)
    return torch.where(counts.sum(dim=1) > 0, _first_greatest(counts), -1)


def majority_accuracy(categories: Tensor, labels: Tensor) -> float:
    """int (N,) twice -> share of images whose class is the majority of their category (also called purity).

    Never less than the share of the most frequent class, and the higher the more categories there are."""
    return float((majority_classes(categories, labels)[categories] == labels).double().mean())


def one_to_one_accuracy(categories: Tensor, labels: Tensor) -> float:
    """int (N,) twice -> the same where each category is mapped to a class of its own, as well as can be.

    A category beyond the number of classes is wrong throughout."""
    counts = table(categories, labels)
    chosen = best_assignment(counts.double())
    right = sum(int(counts[category, label]) for label, category in enumerate(chosen) if category is not None)
    return right / len(labels)


def normalised_information(categories: Tensor, labels: Tensor) -> float:
    """int (N,) twice -> I(category; class) over the mean of both entropies: 0 independent, 1 the same up to names.

    0 where either is constant."""
    counts = table(categories, labels)
    mean = (entropy(counts.sum(dim=1)) + entropy(counts.sum(dim=0))) / 2
    return information(counts) / mean if mean > 0 else 0.0


def table(a: Tensor, b: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    """int (N,) twice, >= 0 -> int64 (rows, columns) at least: how many places have a = row and b = column."""
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"two lists of one length are compared, not {tuple(a.shape)} and {tuple(b.shape)}")
    if min(int(a.min()), int(b.min())) < 0:
        raise ValueError("a category or class is negative: leave out images whose label is not known")
    rows, columns = max(rows, int(a.max()) + 1), max(columns, int(b.max()) + 1)
    return torch.bincount(a.long() * columns + b.long(), minlength=rows * columns).view(rows, columns)


def entropy(counts: Tensor) -> float:
    """Counts of any shape -> entropy of their shares in nats."""
    shares = counts.double() / counts.sum()
    return -float(torch.special.xlogy(shares, shares).sum()) + 0.0  # no -0.0


def information(counts: Tensor) -> float:
    """A table of counts -> mutual information of row and column in nats, >= 0."""
    return max(entropy(counts.sum(dim=1)) + entropy(counts.sum(dim=0)) - entropy(counts), 0.0)


def _columns(codes: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors) or not len(codes):
        raise ValueError(
            f"codes (N, K) and factors (N, F) of one N, not {tuple(codes.shape)} and {tuple(factors.shape)}"
        )
    if not (codes.isfinite().all() and factors.isfinite().all()):
        raise ValueError("a code or factor is not finite")
    return codes.double(), factors.double()


def _varies(columns: Tensor) -> Tensor:
    return (columns != columns[0]).any(dim=0)


def _binned(columns: Tensor, bins: int) -> Tensor:
    """float64 (N, K) -> the bin of each value, int64 (N, K); all 0 in a constant column."""
    low, high = columns.amin(dim=0), columns.amax(dim=0)
    share = (columns - low) / torch.where(high > low, high - low, 1.0)
    return (share * bins).long().clamp(max=bins - 1)


def _ranks(columns: Tensor) -> Tensor:
    """float64 (N, K) -> ranks from 0, float64; equal values share the mean of theirs."""
    ranks = torch.empty_like(columns)
    for k, column in enumerate(columns.T):
        _, place, count = column.unique(return_inverse=True, return_counts=True)
        last = count.cumsum(dim=0).double()
        ranks[:, k] = (last - (count + 1) / 2)[place]
    return ranks


def _first_greatest(counts: Tensor) -> Tensor:
    """(C, L) -> (C,): torch's argmax promises nothing about which of equal values it takes."""
    greatest = counts == counts.amax(dim=1, keepdim=True)
    return torch.where(greatest, torch.arange(counts.shape[1], device=counts.device), counts.shape[1]).amin(dim=1)
