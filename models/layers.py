"""Bricks that two or more models use. Shape legend as in `models.contract`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

SAMPLE_BATCH = 128
"""Latents that are drawn, and decoded, together when sampling: the batch size of the DCGAN paper."""


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images.to(torch.float32) / 255.0


def to_centred(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return to_unit(images) * 2 - 1


class CentredToUnit(nn.Module):
    """[-1, 1] -> [0, 1]; what lies outside is clamped."""

    def forward(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2).clamp(0, 1)


def one_hot(labels: Tensor, classes: int) -> Tensor | None:
    """(B,) -> float (B, K); None where K is 0."""
    return functional.one_hot(labels, classes).float() if classes else None


def even_labels(n: int, classes: int, generator: Generator) -> Tensor:
    """int64 (n,), each drawn evenly from K classes: no part of a sample leaves some out. Draws nothing for K = 0."""
    if not classes:
        return torch.zeros(n, dtype=torch.int64, device=generator.device)
    return torch.randint(classes, (n,), generator=generator, device=generator.device)


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] -> uint8, to the nearest level; what lies outside is clamped."""
    return (images.float() * 255.0).round().clamp(0, 255).to(torch.uint8)


def in_latent_chunks(n: int, draw: Callable[[int], Tensor], decode: Callable[[Tensor], Tensor]) -> Tensor:
    """`decode(draw(SAMPLE_BATCH))` as often as needed, cut to the first `n` rows.

    Latents come in whole chunks and the surplus is dropped, so that image i is the same whatever `n` is: random number
    generators give other values for other lengths, and a network with batch statistics other images.
    """
    if n < 1:
        raise ValueError(f"n is the number of images to draw and must be at least 1, not {n}")
    chunks = [decode(draw(SAMPLE_BATCH)) for _ in range(-(-n // SAMPLE_BATCH))]
    return torch.cat(chunks)[:n]


EXPORT_BATCHES = 16
"""Of SAMPLE_BATCH latents: 2,048 draws behind every frozen statistic."""


@torch.no_grad()
def with_frozen_statistics(network: nn.Module, draw: Callable[[int], Tensor]) -> nn.Module:
    """A copy in eval mode whose batch norms have the mean statistics of EXPORT_BATCHES batches of `draw(SAMPLE_BATCH)`
    latents, so that it decodes one image alone. Those of `network` keep none (`track_running_stats=False`)."""
    frozen = copy.deepcopy(network).train()
    device = next(frozen.parameters()).device
    for norm in frozen.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.track_running_stats, norm.momentum = True, None  # None: a plain mean, every batch weighs alike
            norm.running_mean = torch.zeros(norm.num_features, device=device)
            norm.running_var = torch.zeros(norm.num_features, device=device)
            norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device)
    for _ in range(EXPORT_BATCHES):
        frozen(draw(SAMPLE_BATCH))
    return frozen.eval().requires_grad_(False)


def require_at_least_one(config: object, *fields: str) -> None:
    """`ValueError` naming the first of these fields of a model's config that is below 1."""
    for field in fields:
        value = getattr(config, field)
        if value < 1:
            raise ValueError(f"{field} is {value}; it must be at least 1")


def require_share(images: int, fewest: int, why: str) -> None:
    """`ValueError` when a worker's share of a batch, `images` images, is smaller than `why` asks for."""
    if images < fewest:
        raise ValueError(
            f"a worker's share of a batch is {images} image(s), and {why} {fewest} at least; raise"
            " --training.batch-size, or lower --cluster.workers"
        )
