"""DCGAN: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks", 2015, arXiv 1511.06434. Where the paper is silent, its released code (Newmu/dcgan_code, faces) is followed.

    z ~ U(-1, 1)^d                                                          d = 100
    L_D = -mean log D(x) - mean log(1 - D(G(z)))                            the discriminator's loss
    L_G = -mean log D(G(z))                                                 the generator's, non-saturating

    G: z -> linear to (m, 4, 4), BN, ReLU -> 5x5 stride-2 transposed convolutions that halve the channels and double
       the side, BN and ReLU after each -> C channels at the full side, tanh.
    D: 5x5 stride-2 convolutions that double the channels from ndf and halve the side down to 4x4, BN after each but the
       first, LeakyReLU(.2) -> flatten -> one logit.
    stages = log2(side / 4): 4 at 64x64, 3 at 32x32;   m = ngf * 2^(stages - 1)

No layer has a bias, none pools, none is hidden and fully connected. Weights start as N(0, .02), BN gains as N(1, .02),
BN shifts as 0. The projection's BN normalises each of its m*16 outputs by itself (the code's flat vector), not each
channel. Images are scaled to [-1, 1].

Shape legend: B batch, C channels, H = W side, d latent dimensions (D is the discriminator here), m widest feature map.

BatchNorm always uses the statistics of the batch at hand, when sampling too, as the code does: there are no running
averages, so nothing differs between ranks. Real and generated images go through D in separate batches, so each is
normalised by its own kind. Under data parallelism the statistics are each worker's own: the batch per worker, not only
the global one, is part of a recipe. `sample` decodes in chunks of 128 latents, whatever number is asked for.

Deviations
- The code alternates by the parity of its update counter, each update on a new batch of images. Here one step updates D
  and then G on one batch, so both networks get an update per batch: N images here train each network as 2N there.
- The G of a step answers for the same z that the D of that step was shown, which saves one pass through G.
- The sigmoid of D is folded into the losses (softplus of the logit): the same function without overflow.
- Any square side 4 * 2^stages with stages >= 1 is built; the paper has 64 (and 32 in its ImageNet and SVHN models).
- `export` freezes batch statistics into averages over 16 batches of latents, so that one image can be decoded alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from models.contract import Batch, ImageShape, Metrics
from models.layers import in_latent_chunks, require_at_least_one, to_uint8, to_unit, with_frozen_statistics

BASE = 4  # side of the smallest feature map
LEAK = 0.2  # slope of the leaky ReLU below zero
BN_EPS = 1e-8  # the released code's

D_CERTAIN = 0.97  # p_real above it and p_fake below 1 - it: |logits| > 3.5 on both sides, L_D < .06
FOOLED = 0.7  # p_fake above it: D calls most of what G draws real
BLIND = 0.02  # p_real - p_fake below it: the two kinds of image look alike to D


@dataclass(frozen=True)
class Config:
    """What a DCGAN is made of; the defaults are the paper's."""

    latent: int = 100
    """d, how many uniform random numbers an image is drawn from."""
    generator_width: int = 128
    """ngf: channels of the generator's last hidden feature map; each earlier one has twice as many."""
    discriminator_width: int = 128
    """ndf: channels of the discriminator's first feature map; each later one has twice as many."""
    learning_rate: float = 2e-4
    """Adam's step size, of both networks."""
    beta1: float = 0.5
    """Adam's decay rate of the gradient's running mean, of both networks."""
    beta2: float = 0.999
    """Adam's decay rate of the squared gradient's running mean, of both networks."""
    l2: float = 1e-5
    """Times the weights, added to the gradients of both networks."""


class GeneratorNetwork(nn.Module):
    """G: latents (B, d) in [-1, 1] -> images (B, C, side, side) in [-1, 1]."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        super().__init__()
        widths = [config.generator_width * 2**i for i in reversed(range(_stages(shape)))]
        self.widest = widths[0]
        flat = self.widest * BASE * BASE
        self.project = nn.Linear(config.latent, flat, bias=False)
        self.project_norm = nn.BatchNorm1d(flat, eps=BN_EPS, track_running_stats=False)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [_up(wide, narrow), nn.BatchNorm2d(narrow, eps=BN_EPS, track_running_stats=False), nn.ReLU()]
        self.upsample = nn.Sequential(*layers, _up(widths[-1], shape.channels), nn.Tanh())
        self.apply(initialise)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.project_norm(self.project(z)))
        return self.upsample(h.unflatten(1, (self.widest, BASE, BASE)))


class DiscriminatorNetwork(nn.Module):
    """D: images (B, C, side, side) in [-1, 1] -> logits (B,), positive for "real"."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        super().__init__()
        widths = [config.discriminator_width * 2**i for i in range(_stages(shape))]
        layers: list[nn.Module] = [_down(shape.channels, widths[0]), nn.LeakyReLU(LEAK)]
        for narrow, wide in pairwise(widths):
            norm = nn.BatchNorm2d(wide, eps=BN_EPS, track_running_stats=False)
            layers += [_down(narrow, wide), norm, nn.LeakyReLU(LEAK)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classify = nn.Linear(widths[-1] * BASE * BASE, 1, bias=False)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x)).squeeze(1)


def _up(wide: int, narrow: int) -> nn.Module:
    return nn.ConvTranspose2d(wide, narrow, 5, stride=2, padding=2, output_padding=1, bias=False)


def _down(narrow: int, wide: int) -> nn.Module:
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


def _stages(shape: ImageShape) -> int:
    """How often 4x4 is doubled to reach the side."""
    stages = (shape.height // BASE).bit_length() - 1
    if shape.height != shape.width or stages < 1 or shape.height != BASE * 2**stages:
        raise ValueError(
            f"DCGAN draws square images of side 8, 16, 32, 64, …, not {shape.height}x{shape.width};"
            " ingest the data set at one of these sizes"
        )
    return stages


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """L_D = -mean log D(x) - mean log(1 - D(G(z))), in nats; logits (B,) each."""
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """L_G = -mean log D(G(z)), in nats; logits (B,)."""
    return F.softplus(-fake_logits.float()).mean()


class DCGAN:
    """The learner: two networks, two optimisers, one update of each per batch."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        self.config = config
        self.g = GeneratorNetwork(config, shape)
        self.d = DiscriminatorNetwork(config, shape)
        self.optimizer_g = self._adam(self.g)
        self.optimizer_d = self._adam(self.d)

    def _adam(self, network: nn.Module) -> Adam:
        c = self.config
        # torch's weight_decay is the L2 of the released code: it joins the gradient before Adam's averages
        return Adam(network.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2), weight_decay=c.l2)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.g, "discriminator": self.d}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": self.optimizer_g, "discriminator": self.optimizer_d}

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        x = to_unit(batch.images) * 2 - 1
        fake = self.g(self._latents(len(x), generator))

        self.optimizer_d.zero_grad(set_to_none=True)
        real_logits, fake_logits = self.d(x), self.d(fake.detach())
        loss_d = discriminator_loss(real_logits, fake_logits)
        loss_d.backward()
        self.optimizer_d.step()

        self.optimizer_g.zero_grad(set_to_none=True)
        self.d.requires_grad_(False)  # the generator's loss passes through D without making gradients for it
        loss_g = generator_loss(self.d(fake))
        loss_g.backward()
        self.d.requires_grad_(True)
        self.optimizer_g.step()

        return {
            "loss_d": loss_d.detach(),
            "loss_g": loss_g.detach(),
            "p_real": real_logits.detach().float().sigmoid().mean(),
            "p_fake": fake_logits.detach().float().sigmoid().mean(),
        }

    @torch.no_grad()
    def sample(self, n: int, generator: Generator) -> Tensor:
        decoded = in_latent_chunks(n, lambda size: self._latents(size, generator), self.g)
        return to_uint8((decoded + 1) / 2)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        p_real, p_fake = metrics["p_real"], metrics["p_fake"]
        seen = f"(D says {p_real:.0%} of real and {p_fake:.0%} of drawn images are real)"
        if p_real > D_CERTAIN and p_fake < 1 - D_CERTAIN:
            return [f"the discriminator is certain of nearly every image {seen}: the generator learns little from it"]
        if p_fake > FOOLED:
            return [
                f"the generator fools the discriminator {seen}: it has found a blind spot or D has stopped learning"
            ]
        if p_real - p_fake < BLIND:
            return [
                f"the discriminator sees no difference between real and drawn images {seen}: D has stopped learning"
            ]
        return []

    @torch.no_grad()
    def export(self, generator: Generator) -> tuple[nn.Module, Tensor]:
        """G with frozen batch statistics, latents (B, d) in [-1, 1] -> images (B, C, H, W) in [0, 1]."""
        frozen = with_frozen_statistics(self.g, lambda n: self._latents(n, generator))
        return nn.Sequential(frozen, ToUnit()).eval(), self._latents(2, generator)

    def _latents(self, n: int, generator: Generator) -> Tensor:
        """z ~ U(-1, 1), (n, d)."""
        return torch.rand(n, self.config.latent, generator=generator, device=generator.device) * 2 - 1


class ToUnit(nn.Module):
    """[-1, 1] -> [0, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1) / 2


def build(config: Config, shape: ImageShape) -> DCGAN:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: impossible sizes."""
    require_at_least_one(config, "latent", "generator_width", "discriminator_width")
    return DCGAN(config, shape)
