"""The networks of the semi-supervised experiments of Improved GAN (Salimans et al. 2016, arXiv 1606.03498), as its
released code has them. What they are trained for is in `semi_supervised.py`.

    fully connected (MNIST)
        G: z -> 500 -> 500 softplus, BN after each -> P sigmoid, weight-normalised with a learnt gain
        D: noise N(0, .3) -> 1000 -> 500 -> 250 -> 250 -> 250 ReLU, noise N(0, .5) after each -> K logits
           f = the last hidden layer, before its noise
    convolutional (SVHN: n = 64, CIFAR-10: n = 96)
        G: z -> 512 x 4 x 4, ReLU -> 5x5 stride-2 transposed convolutions to 256, 128, ReLU, BN after each -> C, tanh
        D: dropout .2 -> 3x3 to n, n, n stride 2 -> dropout .5 -> 3x3 to 2n, 2n, 2n stride 2 -> dropout .5
           -> 3x3 without padding, 1x1, 1x1, all to 2n -> f = mean over the places -> K logits; leaky ReLU(.2)

All layers of D are weight-normalised: the gains are set by the first data and stay, but for those of the logits. BN has
a shift and no gain, and the statistics of the batch at hand.

Shape legend: B batch, C channels, H = W side, P = C H W pixels, d latents, K classes, F features.

A discriminator is given its noise, one tensor a noisy place, by its own `noise`; without it is deterministic.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from models.contract import ImageShape
from models.gan.weight_norm import WeightNorm

L = TypeVar("L", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)

BN_EPS = 1e-6
LEAK = 0.2  # slope of the leaky ReLU below zero
BASE = 4  # side of the convolutional generator's first map
INPUT_NOISE, HIDDEN_NOISE = 0.3, 0.5  # standard deviations, fully connected
INPUT_DROPOUT, HIDDEN_DROPOUT = 0.2, 0.5  # shares that are dropped, convolutional


class ShiftedBatchNorm(nn.Module):
    """Batch normalisation by the batch at hand, with a shift and no gain."""

    def __init__(self, norm: type[nn.BatchNorm1d | nn.BatchNorm2d], features: int) -> None:
        super().__init__()
        self.norm = norm(features, eps=BN_EPS, affine=False, track_running_stats=False)
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.shift.view(-1, *[1] * (x.dim() - 2))


class DenseGenerator(nn.Module):
    """z (B, d) in [0, 1] -> images (B, C, H, W) in [0, 1]."""

    def __init__(self, latent: int, shape: ImageShape, width: float) -> None:
        super().__init__()
        self.size = (shape.channels, shape.height, shape.width)
        hidden = scaled(500, width)
        layers: list[nn.Module] = []
        for inputs in (latent, hidden):
            layers += [_glorot(nn.Linear(inputs, hidden, bias=False)), ShiftedBatchNorm(nn.BatchNorm1d, hidden)]
            layers += [nn.Softplus()]
        pixels = shape.channels * shape.height * shape.width
        self.hidden = nn.Sequential(*layers)
        self.draw = WeightNorm(_glorot(nn.Linear(hidden, pixels)), learn_gain=True)

    def forward(self, z: Tensor) -> Tensor:
        return self.draw(self.hidden(z)).sigmoid().unflatten(1, self.size)


class DenseDiscriminator(nn.Module):
    """x (B, C, H, W) -> features f (B, F) and logits l (B, K)."""

    def __init__(self, classes: int, shape: ImageShape, width: float) -> None:
        super().__init__()
        widths = [shape.channels * shape.height * shape.width, *(scaled(n, width) for n in (1000, 500, 250, 250, 250))]
        self.widths = widths
        self.hidden = nn.ModuleList(WeightNorm(_normal(nn.Linear(a, b), 0.1)) for a, b in pairwise(widths))
        self.classify = WeightNorm(_normal(nn.Linear(widths[-1], classes), 0.1), learn_gain=True)

    def forward(self, x: Tensor, noise: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        f = x.flatten(1)
        h = f if noise is None else f + noise[0]
        for i, layer in enumerate(self.hidden, 1):
            f = F.relu(layer(h))
            h = f if noise is None else f + noise[i]
        return f.float(), self.classify(h).float()

    def noise(self, n: int, generator: Generator) -> list[Tensor]:
        """For n images: N(0, .3^2) and N(0, .5^2), to be added."""
        drawn = [torch.randn(n, width, generator=generator, device=generator.device) for width in self.widths]
        return [
            std * noise for std, noise in zip((INPUT_NOISE, *[HIDDEN_NOISE] * len(self.hidden)), drawn, strict=True)
        ]


class ConvolutionalGenerator(nn.Module):
    """z (B, d) in [0, 1] -> images (B, C, side, side) in [-1, 1]."""

    def __init__(self, latent: int, shape: ImageShape, width: float) -> None:
        super().__init__()
        widths = [scaled(512 // 2**stage, width) for stage in range(stages(shape))]
        self.widest = widths[0]
        flat = self.widest * BASE * BASE
        self.project = _normal(nn.Linear(latent, flat, bias=False), 0.05)
        self.project_norm = ShiftedBatchNorm(nn.BatchNorm1d, flat)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            up = _normal(nn.ConvTranspose2d(wide, narrow, 5, 2, padding=2, output_padding=1, bias=False), 0.05)
            layers += [up, ShiftedBatchNorm(nn.BatchNorm2d, narrow), nn.ReLU()]
        self.upsample = nn.Sequential(*layers)
        last = _normal(nn.ConvTranspose2d(widths[-1], shape.channels, 5, 2, padding=2, output_padding=1), 0.05)
        self.draw = WeightNorm(last, learn_gain=True, init_std=0.1)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.project_norm(self.project(z)))
        return self.draw(self.upsample(h.unflatten(1, (self.widest, BASE, BASE)))).tanh()


class ConvolutionalDiscriminator(nn.Module):
    """x (B, C, side, side) -> features f (B, 2n) and logits l (B, K)."""

    def __init__(self, classes: int, shape: ImageShape, width: float, channels: int) -> None:
        super().__init__()
        n, twice = scaled(channels, width), scaled(2 * channels, width)
        side = shape.height
        self.places = ((shape.channels, side, side), (n, side // 2, side // 2), (twice, side // 4, side // 4))
        self.first = nn.Sequential(
            *_conv(shape.channels, n, 3, padding=1), *_conv(n, n, 3, padding=1), *_conv(n, n, 3, padding=1, stride=2)
        )
        self.second = nn.Sequential(
            *_conv(n, twice, 3, padding=1),
            *_conv(twice, twice, 3, padding=1),
            *_conv(twice, twice, 3, padding=1, stride=2),
        )
        self.third = nn.Sequential(*_conv(twice, twice, 3), *_conv(twice, twice, 1), *_conv(twice, twice, 1))
        self.classify = WeightNorm(_normal(nn.Linear(twice, classes), 0.05), learn_gain=True, init_std=0.1)

    def forward(self, x: Tensor, noise: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h = x
        for i, block in enumerate((self.first, self.second, self.third)):
            h = block(h if noise is None else h * noise[i])
        f = h.mean((2, 3))
        return f.float(), self.classify(f).float()

    def noise(self, n: int, generator: Generator) -> list[Tensor]:
        """For n images: what to multiply by, 0 with a probability of .2 or .5, else one over what is left."""
        shares = (INPUT_DROPOUT, HIDDEN_DROPOUT, HIDDEN_DROPOUT)
        drawn = [torch.rand(n, *place, generator=generator, device=generator.device) for place in self.places]
        return [(uniform >= share) / (1 - share) for share, uniform in zip(shares, drawn, strict=True)]


def scaled(paper: int, width: float) -> int:
    """The paper's number of units or channels times `width`, at least 1."""
    return max(1, round(paper * width))


def stages(shape: ImageShape) -> int:
    """How often 4x4 is doubled to reach the side."""
    count = (shape.height // BASE).bit_length() - 1
    if shape.height != shape.width or count < 2 or shape.height != BASE * 2**count:
        raise ValueError(
            f"the convolutional networks take square images of side 16, 32, 64, …, not {shape.height}x{shape.width};"
            " ingest the data set at one of these sizes, or set --model.architecture mnist, which takes any"
        )
    return count


def _conv(inputs: int, outputs: int, kernel: int, *, padding: int = 0, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding)
    return [WeightNorm(_normal(conv, 0.05)), nn.LeakyReLU(LEAK)]


def _normal(layer: L, std: float) -> L:
    nn.init.normal_(layer.weight, 0.0, std)
    return layer


def _glorot(layer: nn.Linear) -> nn.Linear:
    """Lasagne's default: uniform within sqrt(6 / (inputs + outputs))."""
    nn.init.xavier_uniform_(layer.weight)
    return layer
