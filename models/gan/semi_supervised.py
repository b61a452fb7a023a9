"""The semi-supervised classifier of Improved GAN: Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved
Techniques for Training GANs", 2016, arXiv 1606.03498, sections 3.1 and 5. Where the paper is silent, its released code
(openai/improved-gan, mnist_svhn_cifar10, feature matching) is followed.

D is a classifier of K classes and of "drawn by G", class K + 1. Adding one number to all logits changes no softmax, so
the logit of class K + 1 is fixed at 0; with K logits l and Z = log sum_k exp l_k

    D(x) = p(real | x) = sum_k exp l_k / (sum_k exp l_k + 1) = sigmoid(Z)
    L_lab = mean -l_y(x) + Z(x)                                             x, y: the few labelled images
    L_unl = 1/2 [ mean -log D(x) + mean -log(1 - D(G(z))) ]                 x: unlabelled
          = 1/2 [ mean (-Z(x) + softplus Z(x)) + mean softplus Z(G(z)) ]
    L_D   = L_lab + unlabelled_weight * L_unl
    L_G   = mean_j | E f_j(x) - E f_j(G(z)) |                               feature matching, convolutional networks
    L_G   = mean_j ( E f_j(x) - E f_j(G(z)) )^2                             the same, fully connected

with z ~ U(0, 1)^d and f the features that the logits of D are made of. D is noisy while it trains (dropout, or Gaussian
noise on every layer), also where features are matched, and not when it classifies. The networks are in
`semi_supervised_networks.py`. Pixels v come as v / 255 (MNIST), (v - 127.5) / 127.5 (SVHN), (v - 127.5) / 128 (CIFAR).

Shape legend: B batch, N labelled images of a step, C channels, H, W sides, d latents, K classes, F features.

Both networks learn by Adam with beta1 = .5 at step size lr * min((end - n) / (end - start), 1) after n images. The
first half of a step's unlabelled images is for D, the second for G's target E f(x): a batch of 200 is the code's of
100, and an epoch of the code, in which either saw every image once, is two here. Test errors are those of averaged
weights (the loop's average; the code's a <- a + .0001 (p - a) halves in 6,931 steps, 1,386,200 images here).

Without a labelled subset the labels of D's half are used: supervised learning with a third, generated kind of data.

Deviations
- The code draws both halves from two shufflings of their own; here they are halves of one, so that an image is in
  either by chance, as often.
- The first gains and biases come from the images of the first step: labelled ones (convolutional; 500 in the code) or
  unlabelled ones (fully connected; 500). With several workers they are the first worker's.
- The code's Adam has its epsilon of 1e-8 inside the root, torch's has it outside. Outside 1e-4 is taken: the same for
  gradients far above or below 1e-4, and between them a step that is shorter by up to a factor of sqrt(2).
- The average starts from the first weights and forgets them early; the code's starts from zero.
- The step size falls with every step, in the code with every epoch.
- Expectations of features are means over one worker's own share.
- `width` scales all numbers of units and channels; other sides than 32 get more or fewer stages in G.
- Sampling uses batch statistics, of 128 latents at once; `export` freezes averages of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from models.contract import Batch, ImageShape, Metrics, Needs
from models.gan import semi_supervised_networks as networks
from models.gan.weight_norm import initialise
from models.layers import in_latent_chunks, require_at_least_one, require_share, to_uint8, with_frozen_statistics
from models.metrics.classification import errors

ADAM_EPS = 1e-4
FEWEST = 4  # images of one worker's share: two to normalise a batch of G's, in either half

UNLEARNT = 0.5  # error of the labelled images above it: half of what D is told is not learnt
D_CERTAIN = 0.99  # p_real above it and p_fake below 1 - it: L_unl < .01, unlabelled images teach D nothing
FOOLED = 0.7  # p_fake above it: D calls most of what G draws real


@dataclass(frozen=True)
class Config:
    """What it is made of; the defaults are the paper's for MNIST."""

    architecture: Literal["mnist", "svhn", "cifar10"] = "mnist"
    """The networks and the scale of pixels; mnist: fully connected, for images of any shape."""
    classes: int = 10
    """K: labels are 0 … K - 1."""
    latent: int = 100
    """d, how many uniform random numbers an image is drawn from."""
    width: float = 1.0
    """Times the paper's numbers of units and channels."""
    unlabelled_weight: float = 1.0
    """Of L_unl beside L_lab."""
    learning_rate: float = 0.003
    """Adam's step size, of both networks; the code's for SVHN and CIFAR-10 is 3e-4."""
    decay_start: int = 0
    """Images seen up to which the step size stays as it is."""
    decay_end: int = 0
    """Images seen at which the step size, falling linearly, reaches 0; 0: it never falls."""
    beta1: float = 0.5
    """Adam's decay rate of the gradient's running mean, of both networks."""
    beta2: float = 0.999
    """Adam's decay rate of the squared gradient's running mean, of both networks."""


@dataclass(frozen=True)
class Pixels:
    """The scale of an architecture's images: (v - zero) / unit for the 8-bit value v."""

    zero: float
    unit: float

    def scaled(self, images: Tensor) -> Tensor:
        """uint8 -> float32."""
        return (images.to(torch.float32) - self.zero) / self.unit

    def to_unit(self, x: Tensor) -> Tensor:
        """What G draws -> [0, 1]."""
        return ((x * self.unit + self.zero) / 255).clamp(0, 1)


PIXELS = {"mnist": Pixels(0, 255), "svhn": Pixels(127.5, 127.5), "cifar10": Pixels(127.5, 128)}
CHANNELS = {"svhn": 64, "cifar10": 96}


def log_partition(logits: Tensor) -> Tensor:
    """Z = log sum_k exp l_k; (B, K) -> (B,). sigmoid(Z) is D(x)."""
    return torch.logsumexp(logits, dim=1)


def labelled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_lab = mean -l_y + Z, in nats; (N, K) and (N,)."""
    return F.cross_entropy(logits, labels)


def unlabelled_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """L_unl = 1/2 [ mean -log D(x) + mean -log(1 - D(G(z))) ], in nats; (B, K) each."""
    # -Z + softplus(Z) is softplus(-Z), without a difference of large numbers
    return 0.5 * (F.softplus(-log_partition(real_logits)).mean() + F.softplus(log_partition(fake_logits)).mean())


def feature_matching_loss(real: Tensor, fake: Tensor, distance: Literal["l1", "squared"]) -> Tensor:
    """L_G of features (B, F) and (B', F)."""
    difference = real.mean(0) - fake.mean(0)
    return difference.abs().mean() if distance == "l1" else difference.square().mean()


def step_size(config: Config, images_seen: int) -> float:
    """lr * min((end - n) / (end - start), 1), and not below 0."""
    if not config.decay_end:
        return config.learning_rate
    left = (config.decay_end - images_seen) / (config.decay_end - config.decay_start)
    return config.learning_rate * min(max(left, 0.0), 1.0)


class SemiSupervisedGAN:
    """The learner: a generator and a discriminator that classifies, one update of each per batch."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        self.config, self.pixels = config, PIXELS[config.architecture]
        self.shape = shape
        self.g: nn.Module
        self.d: networks.DenseDiscriminator | networks.ConvolutionalDiscriminator
        if config.architecture == "mnist":
            self.g = networks.DenseGenerator(config.latent, shape, config.width)
            self.d = networks.DenseDiscriminator(config.classes, shape, config.width)
        else:
            channels = CHANNELS[config.architecture]
            self.g = networks.ConvolutionalGenerator(config.latent, shape, config.width)
            self.d = networks.ConvolutionalDiscriminator(config.classes, shape, config.width, channels)
        self.optimizer_g = self._adam(self.g)
        self.optimizer_d = self._adam(self.d)

    def _adam(self, network: nn.Module) -> Adam:
        c = self.config
        return Adam(network.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=ADAM_EPS)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.g, "discriminator": self.d}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": self.optimizer_g, "discriminator": self.optimizer_d}

    def needs(self) -> Needs:
        return Needs(classes=self.config.classes, labelled=True)

    def check_share(self, images: int) -> None:
        require_share(images, FEWEST, "D and G halve a share of")

    def initialise(self, batch: Batch, generator: Generator) -> None:
        """Gains and biases of weight-normalised layers, from one noisy pass over the batch."""
        if self.config.architecture == "mnist":
            images = batch.images
        else:
            images, _ = self._labelled(batch)
            z = self._latents(len(batch.images), generator)
            initialise(self.g, lambda: self.g.forward(z))
        x = self.pixels.scaled(images)
        initialise(self.d, lambda: self.d.forward(x, self.d.noise(len(x), generator)))

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        x_lab, y = self._labelled(batch)
        x_unl, x_target = self._halves(batch.images)
        for optimizer in (self.optimizer_d, self.optimizer_g):
            for group in optimizer.param_groups:
                group["lr"] = step_size(self.config, batch.images_seen)

        self.optimizer_d.zero_grad(set_to_none=True)
        with torch.no_grad():
            fake = self.g(self._latents(len(x_unl), generator))
        together = torch.cat([self.pixels.scaled(x_lab), self.pixels.scaled(x_unl), fake.float()])
        _, logits = self._noisy(together, generator)
        lab, unl, gen = logits.split([len(x_lab), len(x_unl), len(fake)])
        loss_lab, loss_unl = labelled_loss(lab, y), unlabelled_loss(unl, gen)
        loss_d = loss_lab + self.config.unlabelled_weight * loss_unl
        loss_d.backward()
        self.optimizer_d.step()

        self.optimizer_g.zero_grad(set_to_none=True)
        self.d.requires_grad_(False)  # G's loss passes through D without making gradients for it
        with torch.no_grad():
            target, _ = self._noisy(self.pixels.scaled(x_target), generator)
        drawn, _ = self._noisy(self.g(self._latents(len(x_target), generator)), generator)
        distance: Literal["l1", "squared"] = "squared" if self.config.architecture == "mnist" else "l1"
        loss_g = feature_matching_loss(target, drawn, distance)
        loss_g.backward()
        self.d.requires_grad_(True)
        self.optimizer_g.step()

        return {
            "loss_lab": loss_lab.detach(),
            "loss_unl": loss_unl.detach(),
            "loss_g": loss_g.detach(),
            "error_lab": errors(lab.detach(), y).mean(),
            "p_real": log_partition(unl.detach()).sigmoid().mean(),
            "p_fake": log_partition(gen.detach()).sigmoid().mean(),
        }

    @torch.no_grad()
    def evaluate(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """error: 1 where the class is wrong, else 0; cross_entropy: nats; (B,) each. Without noise: draws nothing."""
        logits = self.classify(batch.images)
        return {
            "error": errors(logits, batch.labels),
            "cross_entropy": F.cross_entropy(logits, batch.labels, reduction="none"),
        }

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> the logits of the K classes, (B, K), without noise."""
        _, logits = self.d(self.pixels.scaled(images))
        return logits

    @torch.no_grad()
    def sample(self, n: int, generator: Generator) -> Tensor:
        decoded = in_latent_chunks(n, lambda size: self._latents(size, generator), self.g)
        return to_uint8(self.pixels.to_unit(decoded))

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        p_real, p_fake, error = metrics["p_real"], metrics["p_fake"], metrics["error_lab"]
        seen = f"(D says {p_real:.0%} of real and {p_fake:.0%} of drawn images are real)"
        if error > UNLEARNT:
            return [
                f"{error:.0%} of the labelled images are still put into a wrong class: the labels are not being learnt;"
                " lower the learning rate, or give unlabelled images less weight"
            ]
        if p_real > D_CERTAIN and p_fake < 1 - D_CERTAIN:
            return [
                f"the discriminator is certain of nearly every image {seen}: unlabelled images teach it nothing more"
            ]
        if p_fake > FOOLED:
            return [f"the generator fools the discriminator {seen}: D no longer tells where the data lie"]
        return []

    @torch.no_grad()
    def export(self, generator: Generator) -> tuple[nn.Module, Tensor]:
        """G with frozen batch statistics, latents (B, d) in [0, 1] -> images (B, C, H, W) in [0, 1]."""
        frozen = with_frozen_statistics(self.g, lambda n: self._latents(n, generator))
        return nn.Sequential(frozen, ToUnit(self.pixels)).eval(), self._latents(2, generator)

    def export_classifier(self) -> tuple[nn.Module, Tensor]:
        """D without noise, images (B, C, H, W) in [0, 1] -> probabilities of the K classes (B, K)."""
        example = torch.zeros(2, self.shape.channels, self.shape.height, self.shape.width)
        device = next(self.d.parameters()).device
        return Probabilities(self.d, self.pixels).eval().requires_grad_(False), example.to(device)

    def _noisy(self, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """D while it trains: features (B, F), logits (B, K)."""
        return self.d(x, self.d.noise(len(x), generator))

    def _labelled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """uint8 (N, C, H, W) and int64 (N,): the labelled images of a step."""
        if batch.labelled is not None:
            return batch.labelled.images, batch.labelled.labels
        half = len(batch.images) // 2
        return batch.images[:half], batch.labels[:half]

    def _halves(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """D's, and the target of G's."""
        self.check_share(len(images))
        half = len(images) // 2
        return images[:half], images[half:]

    def _latents(self, n: int, generator: Generator) -> Tensor:
        """z ~ U(0, 1), (n, d)."""
        return torch.rand(n, self.config.latent, generator=generator, device=generator.device)


class ToUnit(nn.Module):
    """What G draws -> [0, 1]."""

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        return self.pixels.to_unit(x)


class Probabilities(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> p(y | x, real), (B, K): what `export_classifier` publishes."""

    def __init__(self, discriminator: nn.Module, pixels: Pixels) -> None:
        super().__init__()
        self.discriminator = copy.deepcopy(discriminator)
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        _, logits = self.discriminator((images * 255 - self.pixels.zero) / self.pixels.unit)
        return torch.softmax(logits, dim=1)


def build(config: Config, shape: ImageShape) -> SemiSupervisedGAN:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: impossible settings."""
    require_at_least_one(config, "classes", "latent")
    if config.width <= 0:
        raise ValueError(f"width is {config.width:g}; it must be above 0")
    if config.unlabelled_weight < 0:
        raise ValueError(f"unlabelled_weight is {config.unlabelled_weight:g}; it must not be negative")
    if config.decay_start and not config.decay_end:
        raise ValueError(f"decay_start is {config.decay_start}, and without a decay_end the step size does not fall")
    if config.decay_end and not 0 <= config.decay_start < config.decay_end:
        raise ValueError(
            f"decay_start is {config.decay_start} and decay_end {config.decay_end}; the step size falls between the"
            " two, so the first must lie below the second"
        )
    return SemiSupervisedGAN(config, shape)
