"""R3GAN: Huang, Gokaslan, Kuleshov, Tompkin, "The GAN is dead; long live the GAN! A Modern GAN Baseline", NeurIPS 2024,
arXiv 2501.05441. Where the paper is silent, its released code (brownvc/R3GAN) is followed.

A game that converges, and then no tricks: the relativistic pairing loss asks of D only to put a real image above the
drawn one beside it, and both zero-centred penalties bound D's slope on both sides.

    z ~ N(0, 1)^d,   sp = softplus,   r = D(T x), f = D(T G(z))             paired in the order in which they come
    L_D = E sp(f - r) + R1 + R2,     L_G = E sp(r - f)                      eq. 2, with D and G trained in turn
    R1  = gamma/2 E | grad_x D(T x) |^2,     R2 = gamma/2 E | grad_x D(T G(z)) |^2            x, G(z) before T

T is a random change of each image (`augment.py`). The networks are in `r3gan_networks.py`: residual, convolutional and
without any normalisation, so D(x_i) depends on x_i alone. Images are scaled to [-1, 1]; G ends linear.

Five numbers go from a first to a last value over a burn-in of n_0 images, by half a cosine of the images seen n:

    v(n) = last + (first - last) (1 + cos(pi min(n / n_0, 1))) / 2

Adam's step size falls and its beta2 rises (beta1 = 0), gamma falls, the share of changed images rises; the half-life of
the averaged weights, the fifth, is the loop's. Nothing of it is in a checkpoint: n is the clock of every step.

Shape legend: B batch, C channels, H = W side, d latents, K classes.

Deviations
- One step updates D and then G on one batch; the code takes a new batch for G. Latents are new for G in both.
- The changes T are those of `augment.py`: colour, translation, cutout. The code has those of Karras et al. 2020
  (2006.06676), also mirror, quarter turns, scale, rotation, hue, and makes those of colours to half of the share.
- `mirror` flips each real image with probability 1/2; the code doubles the data set by flipped copies.
- The average of weights is the loop's: its half-life is a tenth of the images seen until it is the run's; the code's
  follows the cosine.
- `bf16`, where a run asks for it, is an autocast of everything; the code has fp16 in all stages but the one at 4x4.
- With classes, each image of a sample is of a class drawn evenly; `export` takes the one-hot label behind the latents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.optim import Adam, Optimizer

from models.contract import Batch, ImageShape, Metrics, Needs
from models.gan.augment import Change, augment
from models.gan.losses import relativistic_discriminator, relativistic_generator
from models.gan.penalties import squared_slope
from models.gan.r3gan_networks import BASE, DiscriminatorNetwork, GeneratorNetwork
from models.layers import (
    CentredToUnit,
    even_labels,
    in_latent_chunks,
    one_hot,
    require_at_least_one,
    to_centred,
    to_uint8,
)

CERTAIN = 0.98  # share of pairs that D puts in order, above which it is as good as never wrong


@dataclass(frozen=True)
class Config:
    """What an R3GAN is made of; the defaults are the released code's for CIFAR-10."""

    latent: int = 64
    """d, how many normal random numbers an image is drawn from."""
    widths: tuple[int, ...] = (768, 768, 768, 768)
    """Channels of G's feature maps at 4x4, 8x8, … up to the side of the images; D has the same the other way round."""
    blocks: int = 2
    """Residual blocks at each side."""
    expansion: int = 2
    """How many times more channels a block has inside."""
    group_width: int = 16
    """Channels that a block's 3x3 convolution mixes; 1536 of them inside are 96 groups."""
    classes: int = 10
    """K: images are drawn of one of K classes, labels 0 … K - 1; 0: whatever the data are."""
    mirror: bool = True
    """Real images are flipped left to right with probability 1/2."""
    augment: tuple[Change, ...] = ("colour", "translation", "cutout")
    """Random changes of all images that D sees, real and drawn."""
    burn_in: int = 20_000_000
    """n_0, images seen until the settings below have gone from their first value to their last."""
    learning_rate: float = 2e-4
    """Adam's step size at first, of both networks."""
    last_learning_rate: float = 5e-5
    """Adam's step size from the end of the burn-in on."""
    beta2: float = 0.9
    """Adam's decay rate of the squared gradient's running mean at first; that of the gradient's mean is 0."""
    last_beta2: float = 0.99
    """Adam's decay rate of the squared gradient's running mean from the end of the burn-in on."""
    gamma: float = 0.05
    """Weight of both penalties of D's slope at first; it must be found anew for every data set and side."""
    last_gamma: float = 0.005
    """Weight of both penalties from the end of the burn-in on."""
    augment_probability: float = 0.0
    """Share of images that each change is made to at first."""
    last_augment_probability: float = 0.55
    """Share of images that each change is made to from the end of the burn-in on."""


@dataclass(frozen=True)
class Scheduled:
    """The settings that change, at one moment."""

    learning_rate: float
    beta2: float
    gamma: float
    augment_probability: float


def scheduled(config: Config, images_seen: int) -> Scheduled:
    """v(n) of each."""
    c, share = config, 1.0
    if c.burn_in:
        share = min(images_seen / c.burn_in, 1.0)
    left = (1 + math.cos(math.pi * share)) / 2

    def now(first: float, last: float) -> float:
        return last + (first - last) * left

    return Scheduled(
        now(c.learning_rate, c.last_learning_rate),
        now(c.beta2, c.last_beta2),
        now(c.gamma, c.last_gamma),
        now(c.augment_probability, c.last_augment_probability),
    )


class R3GAN:
    """The learner: two networks, two optimisers, one update of each per batch."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        self.config = c = config
        inside = (c.widths, c.blocks, c.expansion, c.group_width)
        self.g = GeneratorNetwork(c.latent, c.classes, shape.channels, *inside)
        self.d = DiscriminatorNetwork(c.classes, shape.channels, *inside)
        self.optimizer_g, self.optimizer_d = (
            Adam(network.parameters(), lr=c.learning_rate, betas=(0.0, c.beta2)) for network in (self.g, self.d)
        )

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.g, "discriminator": self.d}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": self.optimizer_g, "discriminator": self.optimizer_d}

    def needs(self) -> Needs:
        return Needs(classes=self.config.classes)

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        now = scheduled(self.config, batch.images_seen)
        for optimizer in self.optimizers().values():
            for group in optimizer.param_groups:
                group["lr"], group["betas"] = now.learning_rate, (0.0, now.beta2)
        x, labels = self._real(batch.images, generator), one_hot(batch.labels, self.config.classes)
        metrics = self._update_discriminator(x, labels, now, generator)
        return metrics | self._update_generator(x, labels, now, generator)

    def _update_discriminator(self, x: Tensor, labels: Tensor | None, now: Scheduled, generator: Generator) -> Metrics:
        with torch.no_grad():
            fake = self.g(self._latents(len(x), generator, labels))
        x, fake = x.detach().requires_grad_(), fake.float().requires_grad_()

        self.optimizer_d.zero_grad(set_to_none=True)
        # uncompiled: compiled graphs have one derivative only
        real_logits = self.d.forward(self._changed(x, now, generator), labels).float()
        fake_logits = self.d.forward(self._changed(fake, now, generator), labels).float()
        loss_d = relativistic_discriminator(real_logits, fake_logits)
        slope_real, slope_fake = squared_slope(real_logits, x).mean(), squared_slope(fake_logits, fake).mean()
        (loss_d + now.gamma / 2 * (slope_real + slope_fake)).backward()
        self.optimizer_d.step()
        gap = (real_logits - fake_logits).detach()
        return {
            "loss_d": loss_d.detach(),
            "gap": gap.mean(),
            "in_order": (gap > 0).float().mean(),
            "slope_real": slope_real.detach(),
            "slope_fake": slope_fake.detach(),
            "gamma": loss_d.new_tensor(now.gamma),
        }

    def _update_generator(self, x: Tensor, labels: Tensor | None, now: Scheduled, generator: Generator) -> Metrics:
        self.optimizer_g.zero_grad(set_to_none=True)
        self.d.requires_grad_(False)  # the generator's loss passes through D without making gradients for it
        fake = self.g(self._latents(len(x), generator, labels))
        fake_logits = self.d(self._changed(fake, now, generator), labels)
        real_logits = self.d(self._changed(x, now, generator), labels)
        loss_g = relativistic_generator(real_logits, fake_logits)
        loss_g.backward()
        self.d.requires_grad_(True)
        self.optimizer_g.step()
        return {"loss_g": loss_g.detach()}

    def _real(self, images: Tensor, generator: Generator) -> Tensor:
        """uint8 -> [-1, 1], some of them mirrored."""
        x = to_centred(images)
        if not self.config.mirror:
            return x
        flipped = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
        return torch.where(flipped, x.flip(3), x)

    def _changed(self, x: Tensor, now: Scheduled, generator: Generator) -> Tensor:
        """T(x)."""
        return augment(x, self.config.augment, now.augment_probability, generator)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator) -> Tensor:
        decoded = in_latent_chunks(n, lambda size: self._any_latents(size, generator), self.g)
        return to_uint8((decoded + 1) / 2)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        in_order, gap = metrics["in_order"], metrics["gap"]
        if gap <= 0:
            return [
                f"the discriminator holds drawn images for more real than real ones (by {-gap:.3g}): it has stopped"
                " learning"
            ]
        if in_order > CERTAIN:
            return [
                f"the discriminator puts {in_order:.1%} of real images above the drawn ones beside them: the generator"
                " learns little from it; raise gamma, which must be found anew for each data set, or add augmentation"
            ]
        return []

    @torch.no_grad()
    def export(self, generator: Generator) -> tuple[nn.Module, Tensor]:
        """G, latents (B, d), with classes the one-hot label behind them (B, d + K) -> images in [0, 1]."""
        module = nn.Sequential(copy.deepcopy(self.g), CentredToUnit()).eval().requires_grad_(False)
        return module, self._any_latents(2, generator)

    def _latents(self, n: int, generator: Generator, labels: Tensor | None) -> Tensor:
        """z ~ N(0, 1), (n, d), and the one-hot labels behind it, (n, d + K)."""
        z = torch.randn(n, self.config.latent, generator=generator, device=generator.device)
        return z if labels is None else torch.cat([z, labels], dim=1)

    def _any_latents(self, n: int, generator: Generator) -> Tensor:
        """Each of a class drawn evenly."""
        classes = self.config.classes
        return self._latents(n, generator, one_hot(even_labels(n, classes, generator), classes))


BOUNDS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("learning_rate", "last_learning_rate"), lambda v: v > 0, "be above 0"),
    (("burn_in", "gamma", "last_gamma"), lambda v: v >= 0, "not be negative"),
    (("beta2", "last_beta2"), lambda v: 0 <= v < 1, "be from 0 to 1, and less than 1"),
    (("augment_probability", "last_augment_probability"), lambda v: 0 <= v <= 1, "be from 0 to 1"),
)
"""Of settings; Adam checks its own only where it is made, and the last ones come later. No number lies nowhere."""


def build(config: Config, shape: ImageShape) -> R3GAN:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: impossible settings."""
    require_at_least_one(config, "latent", "blocks", "expansion", "group_width")
    c = config
    side = BASE * 2 ** (len(c.widths) - 1)
    if not c.widths or (shape.height, shape.width) != (side, side):
        raise ValueError(
            f"widths names {len(c.widths)} sides from {BASE} up by doubling, which is none of images of"
            f" {shape.height}x{shape.width}; name a width for each side from {BASE} to that of the images"
        )
    for width in c.widths:
        if width < 1 or width * c.expansion % c.group_width:
            raise ValueError(
                f"widths has {width}, and {width * c.expansion} channels inside a block are not whole groups of"
                f" group_width {c.group_width}"
            )
    if c.classes < 0 or c.classes == 1:
        raise ValueError(f"classes is {c.classes}; there must be 2 or more to choose from, or 0 for none")
    if len(set(c.augment)) < len(c.augment):
        raise ValueError(f"augment is {' '.join(c.augment)}; each change can be named once")
    for fields, lies, words in BOUNDS:
        for field in fields:
            if not lies(getattr(c, field)):
                raise ValueError(f"{field} is {getattr(c, field):g}; it must {words}")
    return R3GAN(config, shape)
