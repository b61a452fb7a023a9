"""Kernel distance between two sets of features: unbiased, so that few images do for a first look.

Bińkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", 2018 (arXiv 1801.01401). With the features of an
Inception network it is the KID. With the kernel k(x, y) = (<x, y> / d + 1)^3 the squared maximum mean discrepancy of
m features x and n features y is estimated by

    MMD^2 = sum_{i != j} k(x_i, x_j) / m(m-1) + sum_{i != j} k(y_i, y_j) / n(n-1) - 2 sum_{i,j} k(x_i, y_j) / mn

(Gretton et al. 2012, "A Kernel Two-Sample Test"), whose expectation is that of the two distributions at any m and n. It
is 0 where means and second and third moments agree, and estimates of it may be negative. As in the paper it is computed
of many subsets of both sets, drawn at random without replacement: the value is their mean, the spread their standard
deviation.

N does not shift the mean. The standard deviation is that of one subset, not of the mean: it falls with their size, so
it compares at one size only, and since subsets share images, dividing it by the root of their number is no error bar.
A subset is half of the smaller set at most, else all would be nearly the same and seem certain: 1,024 images give
subsets of 512 where papers take 1,000 of 50,000.

Pitfalls: papers print the value times 100 or 1,000 without saying so; features must be as the network gives them, for
the kernel has no scale of its own.

Shape legend: N, M images, d features, m, n images of a subset. Everything is computed in float64: the three terms are
near to one another and their difference is what counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Settings:
    """The protocol of the distance."""

    subsets: int = 100
    """Number of pairs of subsets."""
    size: int = 1000
    """Images of a subset, of each set; fewer where a set has less than twice as many."""
    seed: int = 0
    """Of the subsets."""

    def size_for(self, real: int, fake: int) -> int:
        """Images of a subset of sets of N and M images; `ValueError` where it would be one."""
        size = min(self.size, real // 2, fake // 2)
        if size < 2 or self.subsets < 1:
            raise ValueError(
                f"{self.subsets} subset(s) of {size} of {real} and {fake} images: one or more of two or more are"
                " needed, and a subset is half of a set at most"
            )
        return size

    def protocol(self, real: int, fake: int) -> str:
        """All that a value depends on besides the features themselves."""
        return f"kid-1 subsets={self.subsets} of={self.size_for(real, fake)} subsets-seed={self.seed}"


def kernel_distance(real: Tensor, fake: Tensor, settings: Settings) -> tuple[float, float]:
    """Features (N, d) and (M, d) -> (mean, standard deviation) of MMD^2 over subsets.

    The same subsets on every device. Takes subsets * 6 * size^2 * d floating-point operations: 1.2e12 at d = 2,048."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features are (N, d) and (M, d), not {tuple(real.shape)} and {tuple(fake.shape)}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("a feature is not finite")
    size = settings.size_for(len(real), len(fake))
    generator = Generator().manual_seed(settings.seed)
    values = []
    for _ in range(settings.subsets):
        ours, theirs = (torch.randperm(len(x), generator=generator)[:size].to(x.device) for x in (real, fake))
        values.append(squared_mmd(real[ours], fake[theirs]))
    of_subsets = torch.stack(values)
    return float(of_subsets.mean()), float(of_subsets.std(correction=0))


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Features (m, d) and (n, d), m, n >= 2 -> the unbiased estimate of MMD^2, float64 scalar, on their device."""
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"an unbiased estimate needs two images or more of each, not {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * kernel(x, y).mean()


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(m, d), (n, d) -> k, (m, n)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(x: Tensor) -> Tensor:
    """Of k over all pairs of different rows."""
    values = kernel(x, x)
    return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))
