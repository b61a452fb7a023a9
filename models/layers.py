"""Bricks that two or more models use. Shape legend as in `models.contract`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SAMPLE_BATCH = 128
"""Latents that are drawn, and decoded, together when sampling: the batch size of the DCGAN paper."""


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images.to(torch.float32) / 255.0


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


def require_at_least_one(config: object, *fields: str) -> None:
    """`ValueError` naming the first of these fields of a model's config that is below 1."""
    for field in fields:
        value = getattr(config, field)
        if value < 1:
            raise ValueError(f"{field} is {value}; it must be at least 1")
