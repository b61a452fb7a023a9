"""R3GAN's two networks (Huang, Gokaslan, Kuleshov, Tompkin 2024, arXiv 2501.05441, §4; `r3gan.py` says how they are
trained). They mirror each other, and no layer of either normalises anything.

    block  h -> h + W3 a(W2 a(W1 h + b1) + b2)        1x1 to e times the channels, 3x3 in groups, 1x1 back
           a = leaky ReLU with slope .2
    G      z -> (W z)_c basis_c, a learnt 4x4 map a channel, scaled -> blocks
           -> per further stage: 1x1 where the width changes, doubled side, blocks -> 1x1 to C channels
    D      1x1 from C channels -> blocks -> per further stage: halved side, 1x1 where the width changes, blocks
           -> each channel . a 4x4 map of its own -> linear -> one logit, or with classes the product with e_y

Sides are doubled and halved by the filter (1, 3, 3, 1) across and down, zeros outside: bilinear, without aliases.
With classes G gets an embedding of the class beside z, of as many numbers, and e_y has as many as the widest stage.

Start, as Fixup (Zhang et al. 2019, 1901.09321) has it: W3 = 0, so that every block is the identity; W1, W2 from
N(0, g^2 / fan-in) with g = sqrt(2 / (1 + .2^2)) L^(-1/4) for L blocks in the network, so that an update does not grow
with the depth; the basis from N(0, 1), e_y of m numbers from N(0, 1 / (K m)), every other weight from N(0, 1 / fan-in).
Only W1 and W2 have biases, 0 at first.

Shape legend: B batch, C channels, H = W side, d latents, K classes, e expansion, N channels of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

L = TypeVar("L", nn.Linear, nn.Conv2d)

BASE = 4  # side of the smallest feature map
LEAK = 0.2  # slope of the leaky ReLU below zero
LEAK_GAIN = math.sqrt(2 / (1 + LEAK**2))  # keeps the mean square through a leaky ReLU
FILTER = (1.0, 3.0, 3.0, 1.0)  # (1, 2, 1), smoothed by the (1, 1) of doubling


class GeneratorNetwork(nn.Module):
    """G: latents (B, d), with classes the one-hot label behind them (B, d + K) -> images (B, C, side, side)."""

    def __init__(
        self, latent: int, classes: int, channels: int, widths: Sequence[int], blocks: int, expansion: int, group: int
    ) -> None:
        super().__init__()
        self.latent = latent
        self.embed = _scaled(nn.Linear(classes, latent, bias=False)) if classes else None
        self.weigh = _scaled(nn.Linear(2 * latent if classes else latent, widths[0], bias=False))
        self.basis = nn.Parameter(torch.randn(widths[0], BASE, BASE))
        gain = block_gain(blocks * len(widths))
        layers: list[nn.Module] = [Block(widths[0], expansion, group, gain) for _ in range(blocks)]
        for wide, narrow in pairwise(widths):
            layers += [*_between(wide, narrow), Doubled()]
            layers += [Block(narrow, expansion, group, gain) for _ in range(blocks)]
        self.upsample = nn.Sequential(*layers)
        self.draw = _scaled(nn.Conv2d(widths[-1], channels, 1, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        if self.embed is not None:
            z = torch.cat([z[:, : self.latent], self.embed(z[:, self.latent :])], dim=1)
        return self.draw(self.upsample(self.weigh(z)[:, :, None, None] * self.basis))


class DiscriminatorNetwork(nn.Module):
    """D: images (B, C, side, side), with classes labels (B, K) -> logits (B,); only differences of them mean anything.

    `widths` are in G's order, from the smallest map on.
    """

    def __init__(
        self, classes: int, channels: int, widths: Sequence[int], blocks: int, expansion: int, group: int
    ) -> None:
        super().__init__()
        self.read = _scaled(nn.Conv2d(channels, widths[-1], 1, bias=False))
        gain = block_gain(blocks * len(widths))
        layers: list[nn.Module] = [Block(widths[-1], expansion, group, gain) for _ in range(blocks)]
        for narrow, wide in pairwise(reversed(widths)):
            layers += [Halved(), *_between(narrow, wide)]
            layers += [Block(wide, expansion, group, gain) for _ in range(blocks)]
        self.downsample = nn.Sequential(*layers)
        said = widths[0] if classes else 1
        self.gather = _scaled(nn.Conv2d(widths[0], widths[0], BASE, groups=widths[0], bias=False))
        self.judge = _scaled(nn.Linear(widths[0], said, bias=False))
        self.embed = _scaled(nn.Linear(classes, said, bias=False), 1 / math.sqrt(said)) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        said = self.judge(self.gather(self.downsample(self.read(x))).flatten(1))
        if self.embed is None:
            return said.squeeze(1)
        assert labels is not None, "a D of classes is asked about an image of a class"
        return (said * self.embed(labels)).sum(1)


class Block(nn.Module):
    """h + W3 a(W2 a(W1 h + b1) + b2): (B, N, H, W) -> the same."""

    def __init__(self, width: int, expansion: int, group: int, gain: float) -> None:
        super().__init__()
        inner = width * expansion
        self.widen = _scaled(nn.Conv2d(width, inner, 1), gain)
        self.mix = _scaled(nn.Conv2d(inner, inner, 3, padding=1, groups=inner // group), gain)
        self.narrow = _scaled(nn.Conv2d(inner, width, 1, bias=False), 0)

    def forward(self, h: Tensor) -> Tensor:
        inner = F.leaky_relu(self.widen(h), LEAK)
        inner = F.leaky_relu(self.mix(inner), LEAK)
        return h + self.narrow(inner)


class Resampled(nn.Module):
    """Has the filter; a constant, so it is in no checkpoint."""

    kernel: Tensor  # (1, 1, 4, 4), its sum is 1

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor(FILTER) / sum(FILTER)
        self.register_buffer("kernel", torch.outer(line, line)[None, None], persistent=False)

    def of_each_channel(self, h: Tensor) -> Tensor:
        return self.kernel.to(h.dtype).expand(h.shape[1], 1, -1, -1)


class Doubled(Resampled):
    """(B, N, H, W) -> (B, N, 2H, 2W)."""

    def forward(self, h: Tensor) -> Tensor:
        return F.conv_transpose2d(h, 4 * self.of_each_channel(h), stride=2, padding=1, groups=h.shape[1])


class Halved(Resampled):
    """(B, N, 2H, 2W) -> (B, N, H, W)."""

    def forward(self, h: Tensor) -> Tensor:
        return F.conv2d(h, self.of_each_channel(h), stride=2, padding=1, groups=h.shape[1])


def block_gain(blocks: int) -> float:
    """g of a network of this many blocks: L^(-1 / (2m - 2)) for m = 3 layers a block, times the leaky ReLU's own."""
    return float(LEAK_GAIN * blocks**-0.25)


def _between(width: int, next_width: int) -> list[nn.Module]:
    return [] if width == next_width else [_scaled(nn.Conv2d(width, next_width, 1, bias=False))]


def _scaled(layer: L, gain: float = 1.0) -> L:
    """Weights from N(0, gain^2 / fan-in), biases 0."""
    nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
