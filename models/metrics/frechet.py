"""Fréchet distance between two sets of features: how far apart the normal distributions are that fit them best.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
Nash Equilibrium", 2017 (arXiv 1706.08500). With the 2,048 pooled features of an Inception network it is the FID. Of two
normal distributions it has a closed form (Dowson, Landau 1982):

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

features -> `Moments`, batch by batch, worker by worker -> `frechet_distance`. Moments are merged by the formula of
Chan, Golub, LeVeque (1979), with n = n1 + n2 and e = m2 - m1:

    m = m1 + e n2/n        M = M1 + M2 + e e^T n1 n2/n        S = M / (N - 1)

so nothing is subtracted that is large beside what remains, and batches, workers and their order change a result in its
last digits alone.

The root: with S_i = R_i R_i^T, tr (S1 S2)^(1/2) is the sum of the singular values of R1^T R2. No product is rooted, so
nothing becomes complex and no small number is added to a diagonal; directions in which a set has no spread beyond
rounding (all but N - 1 of them where N <= d) are left out of R, and errors of rounding there are not rooted either.

N matters. The estimate is too high: by about (2 tr S + sum_ij (1 + [i = j]) l_i l_j / (l_i + l_j)) / N for two sets of
N of one normal distribution whose covariance has eigenvalues l; d (d + 5) / 2N where all l are 1. So values compare at
one N only; the literature has 50,000 samples. Below d samples a covariance lacks rank: the number says little then.

Pitfalls: how images were resized, and from which Inception weights features are, changes values by whole points; a
paper's real images may be the training or the test split; the distance sees two moments and nothing else.

Shape legend: N images, d features. Everything is float64, on the device of the features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PROTOCOL = "fid-1"
"""The distance has no settings of its own: the features, their number and what they are of say all."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What a set of features leaves behind; d^2 numbers, however many images it was."""

    count: int
    """N, number of images."""
    mean: Tensor
    """m, float64 (d,)."""
    scatter: Tensor
    """M = sum over images of (x - m)(x - m)^T, float64 (d, d)."""

    def __add__(self, other: Moments) -> Moments:
        """Those of both sets together."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features have {len(self.mean)} and {len(other.mean)} numbers: not of one network")
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), self.scatter + other.scatter + between)

    def covariance(self) -> Tensor:
        """S, float64 (d, d), over N - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two images or more, not {self.count}")
        return self.scatter / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """For storing and sending: {"count": int64 (), "mean": …, "scatter": …}."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}


def moments(features: Tensor) -> Moments:
    """(N, d) of any float type, N >= 0 -> Moments. `ValueError` for what is not finite: it would spoil all the rest."""
    if features.ndim != 2:
        raise ValueError(f"features are (N, d), not {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("a feature is not finite")
    x = features.double()
    mean = x.mean(dim=0) if len(x) else x.new_zeros(x.shape[1])
    x = x - mean
    return Moments(len(x), mean, x.T @ x)


def merged(parts: Iterable[Moments]) -> Moments:
    """Those of all sets together, of one or more."""
    whole = None
    for part in parts:
        whole = part if whole is None else whole + part
    if whole is None:
        raise ValueError("there are no moments to merge")
    return whole


def moments_from_tensors(tensors: Mapping[str, Tensor]) -> Moments:
    """The inverse of `Moments.tensors`; `ValueError` where they are none."""
    missing = {"count", "mean", "scatter"} - tensors.keys()
    if missing:
        raise ValueError(f"stored moments lack {', '.join(sorted(missing))}")
    count, mean, scatter = int(tensors["count"]), tensors["mean"], tensors["scatter"]
    if count < 0 or mean.ndim != 1 or scatter.shape != (len(mean), len(mean)):
        raise ValueError(f"stored moments of {count} images have shapes {tuple(mean.shape)} and {tuple(scatter.shape)}")
    return Moments(count, mean.double(), scatter.double())


def frechet_distance(real: Moments, fake: Moments) -> float:
    """d^2, >= 0, in squared units of the features. What the literature calls FID is this, without a root."""
    if real.mean.shape != fake.mean.shape:
        raise ValueError(f"features have {len(real.mean)} and {len(fake.mean)} numbers: not of one network")
    return gaussian_distance(real.mean, real.covariance(), fake.mean, fake.covariance())


def gaussian_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Means float64 (d,) and covariances (d, d), symmetric and positive up to rounding -> d^2 of the normals."""
    spread = covariance_1.trace() + covariance_2.trace() - 2 * trace_of_root(covariance_1, covariance_2)
    return max(float((mean_1 - mean_2).square().sum() + spread), 0.0)


def trace_of_root(covariance_1: Tensor, covariance_2: Tensor) -> Tensor:
    """tr (S1 S2)^(1/2) of two float64 (d, d), a scalar."""
    return torch.linalg.svdvals(_factor(covariance_1).T @ _factor(covariance_2)).sum()


def _factor(covariance: Tensor) -> Tensor:
    """S (d, d) -> R (d, rank) with R R^T = S, of the eigenvalues that are more than rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)
    return vectors[:, kept] * values[kept].sqrt()
