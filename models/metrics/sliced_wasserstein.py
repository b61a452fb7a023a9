"""Sliced Wasserstein distance between two sets of images: how far apart the distributions of their small patches are.

Rabin, Peyré, Delon, Bernot, "Wasserstein Barycenter and its Application to Texture Mixing", 2011, for the distance;
Karras, Aila, Laine, Lehtinen, "Progressive Growing of GANs", 2018 (arXiv 1710.10196, §5) for patches of a Laplacian
pyramid. It needs no trained feature network, so it runs anywhere; it sees colour and texture at each scale and
knows nothing of objects. Figures compare only under one protocol (`Settings.protocol`), the number of images included.

    SW(A, B) = mean over unit vectors v of W1(<a, v>, <b, v>)
    W1 of two equally large sets on a line = mean |a_(i) - b_(i)|, both sorted

images -> `patch_features`, one set of patches a pyramid level -> `patch_distance` a level -> mean over levels.

Deviation from Karras et al.: both sets are standardised by the *real* patches' mean and standard deviation per channel,
where they standardise each set by its own; so wrong colours and contrast count here. Values are in standard deviations
of real patches.

Shape legend: N images, C channels, H, W sides, P patches an image, k side of a patch, S projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from models.layers import to_unit

_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
_PROJECTED_AT_ONCE = 64  # directions: bounds the memory of the projected sets


@dataclass(frozen=True)
class Settings:
    """The protocol of the distance."""

    patch: int = 7
    """k, side of the square patches in pixels."""
    patches_per_image: int = 32
    """P, patches taken of each image at each pyramid level, at random places."""
    projections: int = 256
    """S, random directions that patches are projected on."""
    smallest: int = 16
    """Shorter side in pixels at which the pyramid ends; an image that is smaller has one level."""
    seed: int = 0
    """Of the patches' places and the directions."""

    def protocol(self, images: int, side: int) -> str:
        """All that a value depends on besides the images themselves; `side`: the shorter one."""
        return (
            f"swd-1 levels={'/'.join(map(str, self.levels(side)))} patch={self.patch}"
            f" per-image={self.patches_per_image} projections={self.projections} n={images} seed={self.seed}"
        )

    def levels(self, side: int) -> list[int]:
        """Shorter sides of the pyramid's levels, finest first."""
        sides = [side]
        while sides[-1] // 2 >= self.smallest:
            sides.append(sides[-1] // 2)
        return sides


def distance(real: Tensor, fake: Tensor, settings: Settings) -> dict[str, float]:
    """uint8 (N, C, H, W) twice, of one shape -> {"swd": mean over levels, "swd_32": that of the level of side 32…}."""
    if real.shape != fake.shape:
        raise ValueError(f"both sets must have one shape; real is {tuple(real.shape)}, fake is {tuple(fake.shape)}")
    generator = Generator().manual_seed(settings.seed)
    places = generator.get_state()
    real_levels = patch_features(real, settings, generator)
    generator.set_state(places)  # the same places in both sets: two equal sets are at distance 0
    fake_levels = patch_features(fake, settings, generator)
    values = {}
    for side, a, b in zip(settings.levels(min(real.shape[-2:])), real_levels, fake_levels, strict=True):
        values[f"swd_{side}"] = patch_distance(a, b, settings, generator)
    return {"swd": sum(values.values()) / len(values), **values}


def patch_features(images: Tensor, settings: Settings, generator: Generator) -> list[Tensor]:
    """uint8 (N, C, H, W) -> for each pyramid level, finest first, patches float32 (N * P, C, k, k).

    `generator` is on the CPU, whatever the images are on: the same places for every device."""
    return [
        _patches(level, settings.patch, settings.patches_per_image, generator)
        for level in laplacian_pyramid(to_unit(images), len(settings.levels(min(images.shape[-2:]))))
    ]


def laplacian_pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """float (N, C, H, W) -> what each halving of the side loses, finest first, and last the smallest image itself."""
    bands = []
    for _ in range(levels - 1):
        smaller = _blur(images)[:, :, ::2, ::2]
        bands.append(images - _expand(smaller, images.shape[-2:]))
        images = smaller
    return [*bands, images]


def patch_distance(real: Tensor, fake: Tensor, settings: Settings, generator: Generator) -> float:
    """Patches (M, C, k, k) twice -> SW in standard deviations of the real patches. `generator` is on the CPU."""
    mean = real.mean(dim=(0, 2, 3), keepdim=True)
    std = real.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-8)
    a, b = ((real - mean) / std).flatten(1), ((fake - mean) / std).flatten(1)
    return float(sliced_wasserstein(a, b, random_directions(a.shape[1], settings.projections, generator)))


def random_directions(dimensions: int, count: int, generator: Generator) -> Tensor:
    """Unit vectors, uniform on the sphere, float32 (dimensions, count), drawn on the CPU: the same for every device."""
    directions = torch.randn(dimensions, count, generator=generator)
    return directions / directions.norm(dim=0, keepdim=True)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
    """Points (M, F) twice and unit vectors (F, S) -> mean over directions of W1 on the line, a scalar."""
    total = torch.zeros((), dtype=torch.float64)
    for v in directions.to(a).split(_PROJECTED_AT_ONCE, dim=1):
        gaps = (a @ v).sort(dim=0).values - (b @ v).sort(dim=0).values
        total += gaps.abs().mean(dim=0).sum().double().cpu()
    return total / directions.shape[1]


def _patches(images: Tensor, size: int, per_image: int, generator: Generator) -> Tensor:
    n, channels, height, width = images.shape
    if min(height, width) < size:
        raise ValueError(f"patches of side {size} do not fit into images of {height}x{width}")
    top = torch.randint(height - size + 1, (n, per_image), generator=generator).to(images.device)
    left = torch.randint(width - size + 1, (n, per_image), generator=generator).to(images.device)
    offsets = torch.arange(size, device=images.device)
    rows = (top[..., None] + offsets)[:, None, :, :, None]  # (N, 1, P, k, 1)
    columns = (left[..., None] + offsets)[:, None, :, None, :]  # (N, 1, P, 1, k)
    image = torch.arange(n, device=images.device)[:, None, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None, None]
    return images[image, channel, rows, columns].transpose(1, 2).flatten(0, 1)


def _blur(images: Tensor) -> Tensor:
    """The separable binomial filter, edges mirrored."""
    channels = images.shape[1]
    kernel = torch.tensor(_BINOMIAL, dtype=images.dtype, device=images.device)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    across = F.conv2d(padded, kernel.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)
    return F.conv2d(across, kernel.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)


def _expand(images: Tensor, size: torch.Size) -> Tensor:
    """Doubles the side: zeros between the pixels, then the filter at four times its weight."""
    spread = images.new_zeros((*images.shape[:2], *size))
    spread[:, :, ::2, ::2] = images
    return _blur(spread) * 4
