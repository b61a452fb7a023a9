"""Precision and recall, density and coverage: how much of the samples lies where the data lies, and the reverse.

Kynkäänniemi, Karras, Laine, Lehtinen, Aila, "Improved Precision and Recall Metric for Assessing Generative Models",
2019 (arXiv 1904.06991), with k = 3; Naeem, Oh, Uh, Choi, Yoo, "Reliable Fidelity and Diversity Metrics for Generative
Models", 2020 (arXiv 2002.09797), with k = 5. A set's manifold is taken to be the union of balls around its features,
each reaching as far as its k-th nearest neighbour in the set, itself not counted:

    precision = mean over fake y of [ y in any ball of a real x ]        quality
    recall    = mean over real x of [ x in any ball of a fake y ]        variety
    density   = mean over fake y of (number of balls of real x that y is in) / k
    coverage  = mean over real x of [ any fake y is in the ball of x ]

One real outlier has a large ball, which makes precision kind; density counts balls instead, and coverage takes balls of
real images alone, which do not grow with bad samples. Of two sets of one distribution density is 1 on average (it has
no upper bound), and coverage is 1 - prod_{i<k} (N - 1 - i) / (N - 1 + M - i), about 1 - 2^-k at M = N: both whatever
the features are, which precision and recall are not.

The border of a ball belongs to it for precision and recall, and does not for density and coverage, as in the code of
each paper's authors. It matters only where features are equal or evenly spaced: of a set against itself, density is 1.

N matters. Balls shrink with N, and each figure depends on N and M: values compare at one of both only. The papers have
50,000 and 10,000 images of each set.

Distances are sums of squared differences, each pair's by itself: slower than by a product of matrices, but equal images
are at distance 0, two sets' distances are symmetric to the bit, and no result depends on how pairs are cut into blocks.
Takes N^2 + M^2 + N M distances of d numbers each: with 10,000 images of both and d = 2,048 that are 6e11 differences, a
quarter of an hour of one core. Memory is that of `pairs_at_once` distances, whatever N is.

Shape legend: N real images, M fake ones, d features, k nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PAIRS_AT_ONCE = 1 << 24
"""Distances in memory: 64 MB of float32."""


@dataclass(frozen=True)
class Settings:
    """The protocol of the four figures."""

    k_precision: int = 3
    """k of precision and recall."""
    k_density: int = 5
    """k of density and coverage."""

    def protocol(self) -> str:
        """All that values depend on besides the features themselves."""
        return f"manifold-1 precision-k={self.k_precision} density-k={self.k_density}"


def measure(real: Tensor, fake: Tensor, settings: Settings, pairs_at_once: int = PAIRS_AT_ONCE) -> dict[str, float]:
    """Features (N, d) and (M, d) on one device, of which each has more than k rows -> the four figures by name.

    In float32 unless they are float64. `pairs_at_once` bounds memory and changes no value; one row of distances to the
    other set is held at least."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features are (N, d) and (M, d), not {tuple(real.shape)} and {tuple(fake.shape)}")
    real, fake = (x if x.dtype == torch.float64 else x.float() for x in (real, fake))
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("a feature is not finite")
    k, k_density = settings.k_precision, settings.k_density
    real_radii = neighbour_distances(real, (k, k_density), pairs_at_once)
    (fake_radii,) = neighbour_distances(fake, (k,), pairs_at_once)
    precise, balls = 0, 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for first, distances in _rows(fake, real, pairs_at_once):  # (rows, N)
        precise += int((distances <= real_radii[0]).any(dim=1).sum())
        recalled |= (distances <= fake_radii[first : first + len(distances), None]).any(dim=0)
        within = distances < real_radii[1]
        balls += int(within.sum())
        covered |= within.any(dim=0)
    return {
        "precision": precise / len(fake),
        "recall": float(recalled.double().mean()),
        "density": balls / (k_density * len(fake)),
        "coverage": float(covered.double().mean()),
    }


def neighbour_distances(points: Tensor, ks: tuple[int, ...], pairs_at_once: int = PAIRS_AT_ONCE) -> list[Tensor]:
    """(N, d) -> for each k the distance of each point to its k-th nearest other one, (N,)."""
    if min(ks) < 1 or max(ks) >= len(points):
        raise ValueError(
            f"{max(ks)} nearest neighbours of each need more images than {len(points)}, and 1 or more of k"
        )
    nearest = [
        distances.topk(max(ks) + 1, largest=False, sorted=True).values  # the first one is the point itself, at 0
        for _, distances in _rows(points, points, pairs_at_once)
    ]
    return [torch.cat([rows[:, k] for rows in nearest]) for k in ks]


def _rows(a: Tensor, b: Tensor, pairs_at_once: int) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, distances (rows, len(b))) of some rows of a at a time to all of b."""
    rows = max(1, pairs_at_once // len(b))
    for first in range(0, len(a), rows):
        # the form by a product of matrices would round otherwise in another block, and put equal points apart
        yield first, torch.cdist(a[first : first + rows], b, compute_mode="donot_use_mm_for_euclid_dist")
