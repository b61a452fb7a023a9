"""DCGAN's two networks (Radford, Metz, Chintala 2015, arXiv 1511.06434; `dcgan.py` says how they are trained).

    G: z -> linear to (m, 4, 4), norm, ReLU -> 5x5 stride-2 transposed convolutions that halve the channels and double
       the side, norm and ReLU after each -> C channels at the full side, tanh.
    D: 5x5 stride-2 convolutions that double the channels from ndf and halve the side down to 4x4, norm after each but
       the first, LeakyReLU(.2) -> flatten, f -> one logit, w . f.

The paper's norm is batch norm. What else there can be, by `Techniques`:
- spectral norm (Miyato et al. 2018, arXiv 1802.05957) and weight norm are of D's weights, the first layer's and the
  last's too, and nothing normalises the outputs; weight-normalised layers have a bias.
- virtual batch norm: a fixed reference batch goes through the network behind the images, and is cut off at its end.
- minibatch features o(f) beside f: the logit is w . (f, o).
- classes, as in Miyato, Koyama 2018 (arXiv 1802.05637) for D: logit w . f + e_y . f with a learnt vector e_y for each
  class y; and as in Mirza, Osindero 2014 (arXiv 1411.1784) for G: z with the one-hot label behind it. The released
  code's conditional MNIST model has the label as further maps on every layer of both; this leaves all of them alone.

Shape legend: B batch, C channels, H = W side, d latent dimensions, K classes, m widest feature map, n reference images,
F features.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from models.contract import ImageShape
from models.gan.minibatch import MinibatchDiscrimination
from models.gan.techniques import Techniques
from models.gan.virtual_batch_norm import VirtualBatchNorm
from models.gan.weight_norm import WeightNorm

BASE = 4  # side of the smallest feature map
LEAK = 0.2  # slope of the leaky ReLU below zero
BN_EPS = 1e-8  # the released code's


class GeneratorNetwork(nn.Module):
    """G: latents (B, d), with classes (B, d + K), in [-1, 1] -> images (B, C, side, side) in [-1, 1]."""

    reference: Tensor | None

    def __init__(self, latent: int, width: int, shape: ImageShape, techniques: Techniques) -> None:
        super().__init__()
        kind, n = techniques.generator_norm, techniques.virtual_reference
        widths = [width * 2**i for i in reversed(range(stages_to(shape)))]
        self.widest = widths[0]
        flat = self.widest * BASE * BASE
        self.project = nn.Linear(latent + techniques.classes, flat, bias=False)
        self.project_norm = _norm(kind, flat, n, flat=True)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [_up(wide, narrow), _norm(kind, narrow, n), nn.ReLU()]
        self.upsample = nn.Sequential(*layers, _up(widths[-1], shape.channels), nn.Tanh())
        self.apply(initialise)
        z = None
        if kind == "virtual":
            z = torch.rand(n, latent) * 2 - 1
            if techniques.classes:
                z = torch.cat([z, F.one_hot(torch.arange(n) % techniques.classes, techniques.classes)], dim=1)
        self.register_buffer("reference", z)

    def forward(self, z: Tensor) -> Tensor:
        if self.reference is None:
            return self._draw(z)
        return self._draw(torch.cat([z, self.reference]))[: -len(self.reference)]

    def _draw(self, z: Tensor) -> Tensor:
        h = F.relu(self.project_norm(self.project(z)))
        return self.upsample(h.unflatten(1, (self.widest, BASE, BASE)))


class DiscriminatorNetwork(nn.Module):
    """D: images (B, C, side, side) in [-1, 1], with classes labels (B, K) -> logits (B,), positive for "real"."""

    reference: Tensor | None

    def __init__(self, width: int, shape: ImageShape, techniques: Techniques) -> None:
        super().__init__()
        self.techniques = techniques
        kind, n = techniques.discriminator_norm, techniques.virtual_reference
        widths = [width * 2**i for i in range(stages_to(shape))]
        layers: list[nn.Module] = [self._weighted(_down(shape.channels, widths[0])), nn.LeakyReLU(LEAK)]
        for narrow, wide in pairwise(widths):
            layers.append(self._weighted(_down(narrow, wide)))
            if kind in ("batch", "virtual"):
                layers.append(_norm(kind, wide, n))
            layers.append(nn.LeakyReLU(LEAK))
        self.features = nn.Sequential(*layers, nn.Flatten())
        flat = widths[-1] * BASE * BASE
        kernels = techniques.minibatch_kernels
        self.compare = MinibatchDiscrimination(flat, kernels, techniques.minibatch_dimensions) if kernels else None
        self.classify = self._weighted(nn.Linear(flat + kernels, 1, bias=False), last=True)
        self.embed = nn.Linear(techniques.classes, flat, bias=False) if techniques.classes else None
        self.apply(initialise)
        if kind == "spectral":
            for module in (*self.features, self.classify, self.embed):
                if isinstance(module, nn.Linear | nn.Conv2d):
                    spectral_norm(module)
        empty = torch.zeros(n, shape.channels, shape.height, shape.width) if kind == "virtual" else None
        self.register_buffer("reference", empty)

    def _weighted(self, layer: nn.Linear | nn.Conv2d, last: bool = False) -> nn.Module:
        if self.techniques.discriminator_norm != "weight":
            return layer
        learnt = self.techniques.learnt_gains
        return WeightNorm(layer, learn_gain=learnt == "all" or (last and learnt == "last"))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        f = self._features(x)
        logits = self.classify(self._compared(f)).squeeze(1)
        if self.embed is not None:
            assert labels is not None, "a D of classes is asked about an image of a class"
            logits = logits + (self.embed(labels) * f).sum(1)
        return logits

    def hidden(self, x: Tensor) -> Tensor:
        """(f, o), all that w weighs: what feature matching compares."""
        return self._compared(self._features(x))

    def _features(self, x: Tensor) -> Tensor:
        """f (B, F)."""
        if self.reference is None:
            return self.features(x)
        return self.features(torch.cat([x, self.reference]))[: -len(self.reference)]

    def _compared(self, f: Tensor) -> Tensor:
        return f if self.compare is None else self.compare(f)


class BesideReference(nn.Module):
    """Virtual batch norm of the images of a batch by those at its end, the reference: (B + n, …) -> the same shape."""

    def __init__(self, channels: int, reference: int) -> None:
        super().__init__()
        self.norm, self.images = VirtualBatchNorm(channels), reference

    def forward(self, h: Tensor) -> Tensor:
        maps = h if h.dim() == 4 else h[:, :, None, None]
        x, r = maps[: -self.images], maps[-self.images :]
        return torch.cat(self.norm(x, r)).view_as(h)


def _norm(kind: Literal["batch", "virtual"], channels: int, reference: int, flat: bool = False) -> nn.Module:
    if kind == "virtual":
        return BesideReference(channels, reference)
    norm = nn.BatchNorm1d if flat else nn.BatchNorm2d
    return norm(channels, eps=BN_EPS, track_running_stats=False)


def _up(wide: int, narrow: int) -> nn.Module:
    return nn.ConvTranspose2d(wide, narrow, 5, stride=2, padding=2, output_padding=1, bias=False)


def _down(narrow: int, wide: int) -> nn.Conv2d:
    return nn.Conv2d(narrow, wide, 5, stride=2, padding=2, bias=False)


def initialise(module: nn.Module) -> None:
    """Weights from N(0, .02), gains of batch norms from N(1, .02), biases and shifts 0."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def stages_to(shape: ImageShape) -> int:
    """How often 4x4 is doubled to reach the side."""
    stages = (shape.height // BASE).bit_length() - 1
    if shape.height != shape.width or stages < 1 or shape.height != BASE * 2**stages:
        raise ValueError(
            f"DCGAN draws square images of side 8, 16, 32, 64, …, not {shape.height}x{shape.width};"
            " ingest the data set at one of these sizes"
        )
    return stages
