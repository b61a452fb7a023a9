"""Latent codes with known priors: K categorical ones, uniform, and N continuous ones, U(-1, 1).

Beside noise z of d numbers they make a latent of L numbers: z, the categorical codes as one-hots, the continuous codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from models.metrics.disentanglement import best_assignment, correlation, mutual_information_gap

WALK = 2.0  # a continuous code is drawn from -1 to 1 and walked from -2 to 2, as in the figures of the InfoGAN paper


@dataclass(frozen=True)
class Codes:
    """What the codes beside the noise are. ValueError: there are none, or they cannot be told apart."""

    noise: int
    """d."""
    categories: tuple[int, ...]
    """n_k, of each categorical code."""
    continuous: int
    """N."""
    given: tuple[str, ...]
    """Names of the first codes, categorical ones first; the others are called c1, c2, … after their place."""

    def __post_init__(self) -> None:
        if min(self.categories, default=2) < 2 or self.continuous < 0 or not self.entropies:
            raise ValueError(
                f"categories are {self.categories} and continuous is {self.continuous}: there must be one code or more,"
                " and two categories or more in a categorical one"
            )
        if len(self.given) > len(self.names) or len(set(self.names)) < len(self.names):
            raise ValueError(f"names are {self.given}: {len(self.names)} codes have a name each, all of them different")

    @property
    def names(self) -> list[str]:
        count = len(self.categories) + self.continuous
        return [self.given[i] if i < len(self.given) else f"c{i + 1}" for i in range(count)]

    @property
    def entropies(self) -> dict[str, float]:
        """H(c), nats, of each kind of code that there is: log n_k of a categorical one, log 2 of a continuous one."""
        kinds = {"categorical": sum(map(math.log, self.categories)), "continuous": self.continuous * math.log(2)}
        return {kind: entropy for kind, entropy in kinds.items() if entropy}

    @property
    def widths(self) -> list[int]:
        """Into which parts the L numbers of a latent split: z, each one-hot, all continuous codes."""
        return [self.noise, *self.categories, self.continuous]

    def latents(self, n: int, generator: Generator) -> Tensor:
        """z and codes from their priors, (n, L)."""
        device = generator.device
        uniform = torch.rand(n, self.noise + self.continuous, generator=generator, device=device) * 2 - 1
        z, values = uniform.split([self.noise, self.continuous], dim=1)
        drawn = (torch.randint(k, (n,), generator=generator, device=device) for k in self.categories)
        one_hots = [F.one_hot(c, k).float() for c, k in zip(drawn, self.categories, strict=True)]
        return torch.cat([z, *one_hots, values], dim=1)

    def walk(self, code: int, start: Tensor, steps: int) -> Tensor:
        """Copies of the latent `start` (L,) that differ in one code, (steps, L): its categories in turn, beginning anew
        after the last, or numbers from -WALK to WALK."""
        latents = start.repeat(steps, 1)
        if code < len(self.categories):
            first, n = sum(self.widths[: code + 1]), self.categories[code]
            latents[:, first : first + n] = F.one_hot(torch.arange(steps, device=start.device) % n, n).float()
        else:
            latents[:, code - len(self.names)] = torch.linspace(-WALK, WALK, steps, device=start.device)
        return latents


def told_of_factors(codes: Mapping[str, Tensor], factors: Tensor) -> dict[str, float]:
    """Continuous codes by name, (B,) each, and what the images were made from, (B, F) -> figures.

    `correlation/CODE/factorJ`: |r| of each code and factor, factors counted from 1. `code_of_factorJ`: which of these
    codes became the factor, counted from 1, each one at most; 0 for none. `factor_correlation`: the mean over all
    factors of |r| with their code, 0 without one. `mig`: the mutual information gap. Factors that do not vary are left
    out; where none is left there are no figures."""
    kept = (factors != factors[0]).any(dim=0).nonzero().flatten().tolist()
    if not kept:
        return {}
    values, varying = torch.stack([*codes.values()], dim=1), factors[:, kept]
    strength = correlation(values, varying)
    chosen = best_assignment(strength)
    figures = {
        f"correlation/{name}/factor{factor + 1}": float(strength[i, j])
        for i, name in enumerate(codes)
        for j, factor in enumerate(kept)
    }
    for factor, code in zip(kept, chosen, strict=True):
        figures[f"code_of_factor{factor + 1}"] = 0.0 if code is None else code + 1.0
    found = [0.0 if code is None else float(strength[code, j]) for j, code in enumerate(chosen)]
    figures["factor_correlation"] = sum(found) / len(found)
    figures["mig"] = float(mutual_information_gap(values, varying).mean())
    return figures
