"""Differentiable augmentation: Zhao, Liu, Lin, Zhu, Han, "Differentiable Augmentation for Data-Efficient GAN Training",
2020, arXiv 2006.10738 (§3 and its released code's ranges).

    L_D = E l(D(T(x))) + E l(D(T(G(z)))),   L_G = E l(D(T(G(z))))        T: a new random change of each image

D never sees an image that is not changed, real or drawn, so G is not taught to draw changed ones; and gradients reach G
through T, so D cannot learn the few real images by heart. Of an image (C, H, W) with pixels in [-1, 1]:

    colour       + b, b ~ U(-.5, .5), to all;  * s, s ~ U(0, 2), around the mean over channels of each pixel;
                 * c, c ~ U(.5, 1.5), around the mean of the image;  in this order
    translation  by whole pixels, U{-side/8 … side/8} down and across; what comes in is 0
    cutout       a square of half the side with its centre anywhere in the image becomes 0

`probability` is the share of images that each of the changes is made to (the paper's is 1).

Shape legend: x (B, C, H, W). Random numbers come from `generator`, the same number of them whatever the probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

Change = Literal["colour", "translation", "cutout"]


def augment(x: Tensor, changes: Sequence[Change], probability: float, generator: Generator) -> Tensor:
    """T(x), one change after the other; x itself where the dice leave it, and always at probability 0."""
    for change in changes:
        made = CHANGES[change](x, generator)
        x = torch.where(_uniform(x, generator) < probability, made, x)
    return x


def colour(x: Tensor, generator: Generator) -> Tensor:
    brightness, saturation, contrast = (_uniform(x, generator) for _ in range(3))
    x = x + (brightness - 0.5)
    x = _around(x.mean(1, keepdim=True), x, 2 * saturation)
    return _around(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)


def translation(x: Tensor, generator: Generator) -> Tensor:
    down, across = (_integers(x, -(side // 8), side // 8 + 1, generator) for side in x.shape[2:])
    return _shifted(_shifted(x, down, 2), across, 3)


def cutout(x: Tensor, generator: Generator) -> Tensor:
    centres = (_integers(x, 0, side + 1 - side // 2 % 2, generator) for side in x.shape[2:])
    hidden = [
        (place >= centre - side // 4) & (place < centre - side // 4 + side // 2)
        for centre, side, place in zip(centres, x.shape[2:], map(_places, (x, x), (2, 3)), strict=True)
    ]
    return x * ~(hidden[0] & hidden[1])


CHANGES: dict[Change, Callable[[Tensor, Generator], Tensor]] = {
    "colour": colour,
    "translation": translation,
    "cutout": cutout,
}


def _around(centre: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return centre + (x - centre) * factor


def _shifted(x: Tensor, by: Tensor, axis: int) -> Tensor:
    """x moved by `by` (B, 1, 1, 1) places along `axis`; 0 comes in."""
    side = x.shape[axis]
    source = _places(x, axis) - by
    moved = x.gather(axis, source.clamp(0, side - 1).expand_as(x))
    return moved * ((source >= 0) & (source < side))


def _places(x: Tensor, axis: int) -> Tensor:
    """0 … side - 1 along `axis`, for broadcasting."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    return torch.arange(x.shape[axis], device=x.device).view(shape)


def _uniform(x: Tensor, generator: Generator) -> Tensor:
    """U(0, 1) an image, (B, 1, 1, 1)."""
    return torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)


def _integers(x: Tensor, low: int, high: int, generator: Generator) -> Tensor:
    """low … high - 1 an image, (B, 1, 1, 1)."""
    return torch.randint(low, high, (len(x), 1, 1, 1), generator=generator, device=x.device)
