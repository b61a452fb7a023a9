"""The ImageNet model of Improved GAN: Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved Techniques for
Training GANs", 2016, arXiv 1606.03498. The paper says little of this model; its released code
(openai/improved-gan, imagenet) is followed.

    D's logits l: K classes and "drawn"; D(x) = sigmoid(log sum_{k <= K} exp l_k - l_{K+1})
    kl(t, p)  = t log(t / p) + (1 - t) log((1 - t) / (1 - p))
    L_D = mean kl(1 - a, D(x)) + mean kl(0, D(G(z))) + mean -log softmax(l(x))_y            a = .25
    L_G = mean kl((1 - a) / 2, D(G(z)))                                 which is D's best where both are equally likely

    G: z -> (8g, 4, 4) -> 5x5 stride-2 transposed convolutions to 4g, 2g, g, g, g channels (128x128) -> 5x5 to C, tanh;
       virtual batch norm and ReLU after each but the last; then g, g, g/2, g/4, g/8, g/8 channels of fresh noise join
    D: noise N(0, .1) -> 3x3 convolutions to d /2, 2d /2, 4d /2, 4d, 4d, 8d /2, 8d /2 -> linear to 40d, cross batch norm
       and LeakyReLU(.2) after each -> with minibatch features -> K + 1 logits

All random numbers of an image are one vector z ~ U(-1, 1): 8192 for the projection, then those of the noise maps,
201,728 in all at 128x128. The reference batch of the virtual batch norms (`virtual_batch_norm.py`) is drawn once.

Minibatch features: M = h W in R^{A x B}, c_a(i, j) = exp(-|M_ia - M_ja|_1); of each image the mean of c_a over the real
images and the mean over the drawn ones, both without itself. A = 300 kernels of B = 50 dimensions.

Cross batch norm: real and drawn images pass D together. The first half of the channels is normalised by the moments of
the real images, the second by those of the drawn ones, both for all images.

Shape legend: B batch, C channels, H = W side, K classes, g, d widths, A kernels, R images of the reference.

Both gradients are of one pass, at the same weights: neither network sees the other's update of a step. Statistics of D
are each worker's own, so the batch per worker is part of a recipe (the code: 16 on each of four GPUs).

Deviations
- No bias where a normalisation or a distance takes it out again.
- Strided convolutions pad evenly; TensorFlow's SAME pads one more on one side.
- Any side of 32, 64, 128; the smaller ones leave G's last stages out.
- The variance of a virtual batch norm is clamped at 0 against rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from models.contract import Batch, ImageShape, Metrics, Needs
from models.gan.virtual_batch_norm import VirtualBatchNorm
from models.layers import in_latent_chunks, require_at_least_one, require_share, to_centred, to_uint8

L = TypeVar("L", nn.Linear, nn.ConvTranspose2d)

BASE = 4  # side of the smallest feature map
LEAK = 0.2
BN_EPS = 1e-5
INPUT_NOISE = 0.1
WIDTHS = (8, 4, 2, 1, 1, 1)  # times g: channels of G's maps, from 4x4 on
NOISE_WIDTHS = (1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 8)  # times g: channels of noise beside them
CONVOLUTIONS = ((1, 2), (2, 2), (4, 2), (4, 1), (4, 1), (8, 2), (8, 2))  # times d, stride: 32 to 1

D_CERTAIN = 0.02  # p_fake below it: G is told what it is told anyway
FOOLED = 0.6  # p_fake above it; the optimum of both is (1 - a) / 2 = .375
BLIND = 0.02  # p_real - p_fake below it: the two kinds of image look alike to D


@dataclass(frozen=True)
class Config:
    """What it is made of; the defaults are the released code's."""

    latent: int = 8192
    """Random numbers of the projection; the noise maps have more."""
    generator_width: int = 64
    """g, channels of G's maps from 32x32 on."""
    discriminator_width: int = 64
    """d, channels of D's first map."""
    kernels: int = 300
    """A, minibatch features of real and of drawn neighbours, each."""
    kernel_dimensions: int = 50
    """B, in which distances between images are taken."""
    classes: int = 1000
    """K: labels are 0 … K - 1."""
    reference: int = 16
    """R, images of the reference batch; the code's is its batch on one GPU."""
    smoothing: float = 0.25
    """a: real images are to be called real with probability 1 - a."""
    learning_rate: float = 4e-4
    """Adam's step size, of both networks."""
    beta1: float = 0.5
    """Adam's decay rate of the gradient's running mean, of both networks."""
    beta2: float = 0.999
    """Adam's decay rate of the squared gradient's running mean, of both networks."""


class GeneratorNetwork(nn.Module):
    """G: all random numbers of an image (B, n) in [-1, 1] -> images (B, C, side, side) in [-1, 1]."""

    reference: Tensor

    def __init__(self, config: Config, shape: ImageShape) -> None:
        super().__init__()
        g, count = config.generator_width, _stages(shape) + 1
        widths = [factor * g for factor in WIDTHS[:count]]
        self.noise = [
            (max(1, int(factor * g)), BASE * 2**i, BASE * 2**i) for i, factor in enumerate(NOISE_WIDTHS[:count])
        ]
        self.widest = widths[0]
        self.sizes = [config.latent, *(math.prod(size) for size in self.noise)]
        self.project = _normal(nn.Linear(config.latent, self.widest * BASE * BASE, bias=False), 0.02)
        inputs = [width + noise[0] for width, noise in zip(widths, self.noise, strict=True)]
        self.up = nn.ModuleList(_up(a, b) for a, b in zip(inputs, widths[1:], strict=False))
        self.norms = nn.ModuleList(VirtualBatchNorm(width) for width in widths)
        self.draw = _normal(nn.ConvTranspose2d(inputs[-1], shape.channels, 5, padding=2), 0.075)
        nn.init.constant_(self.draw.bias, -0.45)  # type: ignore[arg-type]
        self.register_buffer("reference", torch.rand(config.reference, sum(self.sizes)) * 2 - 1)

    def forward(self, z: Tensor) -> Tensor:
        first, *noise = z.split(self.sizes, dim=1)
        first_r, *noise_r = self.reference.split(self.sizes, dim=1)
        x, r = (self.project(own).unflatten(1, (self.widest, BASE, BASE)) for own in (first, first_r))
        for i, size in enumerate(self.noise):
            if i:
                x, r = self.up[i - 1](x), self.up[i - 1](r)
            x, r = self.norms[i](x, r)
            x = torch.cat([F.relu(x), noise[i].unflatten(1, size)], dim=1)
            r = torch.cat([F.relu(r), noise_r[i].unflatten(1, size)], dim=1)
        return self.draw(x).tanh()


class CrossBatchNorm(nn.Module):
    """x (2B, C, …), real images and then drawn ones: the first half of the channels is normalised by the moments of the
    real ones, the second by those of the drawn ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        images, channels = len(x) // 2, x.shape[1] // 2
        over = [0, *range(2, x.dim())]
        by_real = torch.var_mean(x[:images, :channels], over, correction=0, keepdim=True)
        by_drawn = torch.var_mean(x[images:, channels:], over, correction=0, keepdim=True)
        variance, mean = (torch.cat(pair, dim=1) for pair in zip(by_real, by_drawn, strict=True))
        shape = (-1, *[1] * (x.dim() - 2))
        return self.gamma.view(shape) * (x - mean) * torch.rsqrt(variance + BN_EPS) + self.beta.view(shape)


class DiscriminatorNetwork(nn.Module):
    """D: real images and then as many drawn ones (2B, C, side, side) in [-1, 1] -> logits (2B, K + 1)."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        super().__init__()
        d, inputs = config.discriminator_width, shape.channels
        layers: list[nn.Module] = []
        for factor, stride in CONVOLUTIONS:
            conv = nn.Conv2d(inputs, factor * d, 3, stride=stride, padding=1, bias=False)
            nn.init.trunc_normal_(conv.weight, 0.0, 0.02, -0.04, 0.04)
            layers += [conv, CrossBatchNorm(factor * d), nn.LeakyReLU(LEAK)]
            inputs = factor * d
        flat = inputs * (shape.height // 32) ** 2
        layers += [nn.Flatten(), _normal(nn.Linear(flat, 40 * d, bias=False), 0.02)]
        self.tower = nn.Sequential(*layers, CrossBatchNorm(40 * d), nn.LeakyReLU(LEAK))
        self.kernels = config.kernels
        self.compare = _normal(nn.Linear(40 * d, config.kernels * config.kernel_dimensions, bias=False), 0.02)
        self.classify = _normal(nn.Linear(40 * d + 2 * config.kernels, config.classes + 1), 0.02)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tower(x)
        activation = self.compare(h).unflatten(1, (self.kernels, -1))
        return self.classify(torch.cat([h, minibatch_features(activation)], dim=1)).float()


def minibatch_features(activation: Tensor) -> Tensor:
    """M (2B, A, dimensions), real images and then drawn ones -> (2B, 2A): the mean of exp(-|M_i - M_j|_1) over the real
    and over the drawn j other than i."""
    m = activation.float().transpose(0, 1)
    closeness = torch.exp(-torch.cdist(m, m, p=1)).permute(1, 2, 0)  # (2B, 2B, A)
    others = 1 - torch.eye(len(closeness), device=m.device)
    half = len(closeness) // 2
    sums = (closeness * others[:, :, None]).unflatten(1, (2, half)).sum(2)  # (2B, 2, A)
    return (sums / others.unflatten(1, (2, half)).sum(2, keepdim=True)).flatten(1)


def real_logit(logits: Tensor) -> Tensor:
    """log sum_{k <= K} exp l_k - l_{K+1}, (B, K + 1) -> (B,): D's logit of "real"."""
    return torch.logsumexp(logits[:, :-1], dim=1) - logits[:, -1]


def kl_to_target(target: float, logits: Tensor) -> Tensor:
    """kl(t, sigmoid(logit)) in nats: cross-entropy minus the entropy of t, so that 0 is the best there is; (B,)."""
    entropy = -sum(p * math.log(p) for p in (target, 1 - target) if p > 0)
    return F.softplus(logits) - target * logits - entropy


class ImageNetGAN:
    """The learner: two networks, both updated by one pass."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        self.config = config
        self.g = GeneratorNetwork(config, shape)
        self.d = DiscriminatorNetwork(config, shape)
        self.optimizer_g = self._adam(self.g)
        self.optimizer_d = self._adam(self.d)

    def _adam(self, network: nn.Module) -> Adam:
        c = self.config
        return Adam(network.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2))

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.g, "discriminator": self.d}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": self.optimizer_g, "discriminator": self.optimizer_d}

    def needs(self) -> Needs:
        return Needs(classes=self.config.classes)

    def check_share(self, images: int) -> None:
        require_share(images, 2, "minibatch features compare")

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        x, half = to_centred(batch.images), len(batch.images)
        joint = torch.cat([x, self.g(self._latents(half, generator)).float()])
        noise = INPUT_NOISE * torch.randn(joint.shape, generator=generator, device=joint.device)
        logits = self.d(joint + noise)
        real, fake = real_logit(logits).split(half)
        smoothed = 1 - self.config.smoothing
        loss_class = F.cross_entropy(logits[:half], batch.labels)
        loss_d = kl_to_target(smoothed, real).mean() + kl_to_target(0.0, fake).mean() + loss_class
        loss_g = kl_to_target(smoothed / 2, fake).mean()

        # Both gradients before either update: they are of the same weights.
        of_d = torch.autograd.grad(loss_d, [*self.d.parameters()], retain_graph=True)
        of_g = torch.autograd.grad(loss_g, [*self.g.parameters()])
        for network, gradients in ((self.d, of_d), (self.g, of_g)):
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient
        self.optimizer_d.step()
        self.optimizer_g.step()

        return {
            "loss_d": loss_d.detach(),
            "loss_class": loss_class.detach(),
            "loss_g": loss_g.detach(),
            "p_real": real.detach().sigmoid().mean(),
            "p_fake": fake.detach().sigmoid().mean(),
        }

    @torch.no_grad()
    def sample(self, n: int, generator: Generator) -> Tensor:
        decoded = in_latent_chunks(n, lambda size: self._latents(size, generator), self.g)
        return to_uint8((decoded + 1) / 2)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        p_real, p_fake = metrics["p_real"], metrics["p_fake"]
        seen = f"(D says {p_real:.0%} of real and {p_fake:.0%} of drawn images are real)"
        if p_fake < D_CERTAIN:
            return [f"the discriminator knows nearly every drawn image {seen}: the generator learns little from it"]
        if p_fake > FOOLED:
            return [f"the generator fools the discriminator {seen}: it has found a blind spot"]
        if p_real - p_fake < BLIND:
            return [
                f"the discriminator sees no difference between real and drawn images {seen}: D has stopped learning"
            ]
        return []

    @torch.no_grad()
    def export(self, generator: Generator) -> tuple[nn.Module, Tensor]:
        """An image's random numbers (B, n) in [-1, 1] -> images (B, C, H, W) in [0, 1]; the reference is inside."""
        return Published(self.g).eval().requires_grad_(False), self._latents(2, generator)

    def _latents(self, n: int, generator: Generator) -> Tensor:
        """z ~ U(-1, 1), (n, all random numbers of an image)."""
        return torch.rand(n, sum(self.g.sizes), generator=generator, device=generator.device) * 2 - 1


class Published(nn.Module):
    """G, from [-1, 1] to [0, 1]."""

    def __init__(self, generator: GeneratorNetwork) -> None:
        super().__init__()
        self.generator = copy.deepcopy(generator)

    def forward(self, z: Tensor) -> Tensor:
        return (self.generator(z) + 1) / 2


def _up(wide: int, narrow: int) -> nn.Module:
    return _normal(nn.ConvTranspose2d(wide, narrow, 5, stride=2, padding=2, output_padding=1, bias=False), 0.02)


def _normal(layer: L, std: float) -> L:
    nn.init.normal_(layer.weight, 0.0, std)
    return layer


def _stages(shape: ImageShape) -> int:
    """How often 4x4 is doubled to reach the side."""
    if shape.height != shape.width or shape.height not in (32, 64, 128):
        raise ValueError(
            f"this model draws square images of side 32, 64 or 128, not {shape.height}x{shape.width};"
            " ingest the data set at one of these sizes"
        )
    return (shape.height // BASE).bit_length() - 1


def build(config: Config, shape: ImageShape) -> ImageNetGAN:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: impossible settings."""
    sizes = ("latent", "generator_width", "discriminator_width", "kernels", "kernel_dimensions", "classes", "reference")
    require_at_least_one(config, *sizes)
    if config.discriminator_width % 2:
        raise ValueError(f"discriminator_width is {config.discriminator_width}; it must be even: its halves differ")
    if not 0 <= config.smoothing < 1:
        raise ValueError(f"smoothing is {config.smoothing:g}; it must be at least 0 and below 1")
    return ImageNetGAN(config, shape)
