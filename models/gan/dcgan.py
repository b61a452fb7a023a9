"""DCGAN: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks", 2015, arXiv 1511.06434. Where the paper is silent, its released code (Newmu/dcgan_code, faces) is followed.

    z ~ U(-1, 1)^d                                                          d = 100
    L_D = -mean log D(x) - mean log(1 - D(G(z)))                            the discriminator's loss
    L_G = -mean log D(G(z))                                                 the generator's, non-saturating

    G: z -> linear to (m, 4, 4), BN, ReLU -> 5x5 stride-2 transposed convolutions that halve the channels and double
       the side, BN and ReLU after each -> C channels at the full side, tanh.
    D: 5x5 stride-2 convolutions that double the channels from ndf and halve the side down to 4x4, BN after each but the
       first, LeakyReLU(.2) -> flatten -> one logit.
    stages = log2(side / 4): 4 at 64x64, 3 at 32x32;   m = ngf * 2^(stages - 1)         (dcgan_networks.py)

No layer has a bias, none pools, none is hidden and fully connected. Weights start as N(0, .02), BN gains as N(1, .02),
BN shifts as 0. The projection's BN normalises each of its m*16 outputs by itself (the code's flat vector), not each
channel. Images are scaled to [-1, 1].

Shape legend: B batch, C channels, H = W side, d latent dimensions (D is the discriminator here), m widest feature map.

BatchNorm always uses the statistics of the batch at hand, when sampling too, as the code does: there are no running
averages, so nothing differs between ranks. Real and generated images go through D in separate batches, so each is
normalised by its own kind. Under data parallelism the statistics are each worker's own: the batch per worker, not only
the global one, is part of a recipe. `sample` decodes in chunks of 128 latents, whatever number is asked for.

Every later technique is a setting, and off (techniques.py; Improved GAN's: Salimans et al. 2016, arXiv 1606.03498).
With all of them the update is, for parts 1 … k of a step's batch, k = discriminator_steps:

    D:  L_D(D(T x), D(T G(z)))  +  penalty of D's slope  +  w | theta_D - mean theta_D |^2     x: part i, z: new
    G:  L_G(D(T x), D(T G(z)))  or  | E f(T x) - E f(T G(z)) |^2,  + w | theta_G - mean theta_G |^2     x, z: part k's

T is a random change of each image; f is all that D's last layer weighs, minibatch features too. Minibatch features,
norms and classes are in the networks. What the first images make (gains of weight norm; D's reference batch) is made by
the first worker's, before the first step, and the same on all. A penalty is of the slope at the unchanged image,
through T.

Deviations
- The code alternates by the parity of its update counter, each update on a new batch of images. Here one step updates D
  and then G on one batch, so both networks get an update per batch: N images here train each network as 2N there.
- The G of a step answers for the same z that the D of that step was shown, which saves one pass through G.
- The sigmoid of D is folded into the losses (softplus of the logit): the same function without overflow.
- Any square side 4 * 2^stages with stages >= 1 is built; the paper has 64 (and 32 in its ImageNet and SVHN models).
- `export` freezes batch statistics into averages over 16 batches of latents, so that one image can be decoded alone.
- With classes, each image of a sample is of a class drawn evenly; `export` takes the one-hot label behind the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.optim import Adam, Optimizer

from models.contract import Batch, ImageShape, Metrics, Needs
from models.gan import weight_norm
from models.gan.augment import augment
from models.gan.dcgan_networks import DiscriminatorNetwork, GeneratorNetwork
from models.gan.historical import HistoricalAverage
from models.gan.losses import CLASSIFIES, GAMES, feature_matching, smoothed_cross_entropy
from models.gan.penalties import one_centred, zero_centred
from models.gan.techniques import Techniques
from models.layers import (
    CentredToUnit,
    even_labels,
    in_latent_chunks,
    one_hot,
    require_at_least_one,
    to_centred,
    to_uint8,
    with_frozen_statistics,
)

D_CERTAIN = 0.97  # p_real above it and p_fake below 1 - it: |logits| > 3.5 on both sides, L_D < .06
FOOLED = 0.7  # p_fake above it: D calls most of what G draws real
BLIND = 0.02  # p_real - p_fake below it: the two kinds of image look alike to D


@dataclass(frozen=True)
class Config(Techniques):
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


class DCGAN:
    """The learner: two networks, two optimisers; per batch, updates of D and then one of G."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        self.config, self.game = config, GAMES[config.loss]
        self.g = GeneratorNetwork(config.latent, config.generator_width, shape, config)
        self.d = DiscriminatorNetwork(config.discriminator_width, shape, config)
        self.optimizer_g = self._adam(self.g, config.learning_rate)
        self.optimizer_d = self._adam(self.d, config.discriminator_learning_rate or config.learning_rate)
        self.histories: dict[str, nn.Module] = {}
        if config.historical_weight:
            self.histories = {
                "generator_history": HistoricalAverage(self.g),
                "discriminator_history": HistoricalAverage(self.d),
            }

    def _adam(self, network: nn.Module, learning_rate: float) -> Adam:
        c = self.config
        # torch's weight_decay is the L2 of the released code: it joins the gradient before Adam's averages
        return Adam(network.parameters(), lr=learning_rate, betas=(c.beta1, c.beta2), weight_decay=c.l2)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.g, "discriminator": self.d, **self.histories}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": self.optimizer_g, "discriminator": self.optimizer_d}

    def needs(self) -> Needs:
        return Needs(classes=self.config.classes)

    def check_share(self, images: int) -> None:
        c = self.config
        if images % c.discriminator_steps:
            raise ValueError(
                f"a worker's share of a batch is {images} image(s), which discriminator_steps {c.discriminator_steps}"
                " cannot divide evenly; choose a --training.batch-size that"
                f" {c.discriminator_steps} times the number of workers divides"
            )
        if c.discriminator_norm == "virtual" and images < c.virtual_reference:
            raise ValueError(
                f"a worker's share of a batch is {images} image(s), too few for a virtual_reference of"
                f" {c.virtual_reference}; lower it, or raise --training.batch-size"
            )
        if images // c.discriminator_steps < 2 and (c.generator_norm == "batch" or c.minibatch_kernels):
            lacks = "is nothing to normalise by" if c.generator_norm == "batch" else "are no neighbours to compare with"
            raise ValueError(
                f"there {lacks} where an update sees one image alone, of a worker's share of {images}; raise"
                " --training.batch-size"
            )

    @torch.no_grad()
    def initialise(self, batch: Batch, generator: Generator) -> None:
        """D's reference batch, or the gains and biases of its normalised weights; nothing where it has neither."""
        self.check_share(len(batch.images))
        x = to_centred(batch.images)
        if self.d.reference is not None:
            self.d.reference.copy_(x[: len(self.d.reference)])
        labels = one_hot(batch.labels, self.config.classes)
        weight_norm.initialise(self.d, lambda: self.d.forward(x, labels))

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        """Of several updates of D the last one's figures."""
        metrics: Metrics = {}
        for x, labels in self._parts(batch):
            fake = self.g(self._latents(len(x), generator, labels))
            metrics |= self._update_discriminator(x, fake.detach(), labels, generator)
        return metrics | self._update_generator(x, fake, labels, generator)

    def _update_discriminator(self, x: Tensor, fake: Tensor, labels: Tensor | None, generator: Generator) -> Metrics:
        c = self.config
        d: Callable[[Tensor, Tensor | None], Tensor] = self.d
        if c.penalty != "none":
            d = self.d.forward  # uncompiled: compiled graphs have one derivative only
            x, fake = x.detach().requires_grad_(), fake.float().requires_grad_()  # bf16 autocast draws in bf16

        self.optimizer_d.zero_grad(set_to_none=True)
        real_logits = d(self._changed(x, generator), labels)
        fake_logits = d(self._changed(fake, generator), labels)
        if c.real_label == 1:
            loss_d = self.game.discriminator(real_logits, fake_logits)
        else:
            loss_d = smoothed_cross_entropy(real_logits, fake_logits, c.real_label)
        loss, metrics = loss_d, {"loss_d": loss_d.detach(), **self._seen(real_logits.detach(), fake_logits.detach())}
        if c.penalty == "wgan-gp":
            penalty = one_centred(
                lambda at: d(self._changed(at, generator), labels), x, fake, c.penalty_weight, generator
            )
        elif c.penalty != "none":
            at = {
                "r1": [(real_logits, x)],
                "r2": [(fake_logits, fake)],
                "r1+r2": [(real_logits, x), (fake_logits, fake)],
            }
            penalty = torch.stack([zero_centred(*pair, c.penalty_weight) for pair in at[c.penalty]]).sum()
        if c.penalty != "none":
            loss, metrics["penalty"] = loss + penalty, penalty.detach()
        self._away_from_history(loss, "discriminator", self.d).backward()
        self.optimizer_d.step()
        return metrics

    def _update_generator(self, x: Tensor, fake: Tensor, labels: Tensor | None, generator: Generator) -> Metrics:
        self.optimizer_g.zero_grad(set_to_none=True)
        self.d.requires_grad_(False)  # the generator's loss passes through D without making gradients for it
        if self.config.feature_matching:
            loss_g = feature_matching(
                self.d.hidden(self._changed(x, generator)), self.d.hidden(self._changed(fake, generator))
            )
        else:
            fake_logits = real_logits = self.d(self._changed(fake, generator), labels)
            if self.config.loss == "relativistic":  # the only one that looks at real images too
                real_logits = self.d(self._changed(x, generator), labels)
            loss_g = self.game.generator(real_logits, fake_logits)
        self._away_from_history(loss_g, "generator", self.g).backward()
        self.d.requires_grad_(True)
        self.optimizer_g.step()
        return {"loss_g": loss_g.detach()}

    def _away_from_history(self, loss: Tensor, name: str, network: nn.Module) -> Tensor:
        """The loss with w | theta - mean theta |^2, when the run has it."""
        history = self.histories.get(f"{name}_history")
        if not isinstance(history, HistoricalAverage):
            return loss
        history.add(network)
        return loss + self.config.historical_weight * history.distance(network)

    def _parts(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Equal parts of a batch, one for each update of D: images (B / k, C, H, W), one-hot labels (B / k, K)."""
        self.check_share(len(batch.images))
        k, x, labels = (
            self.config.discriminator_steps,
            to_centred(batch.images),
            one_hot(batch.labels, self.config.classes),
        )
        parts = [None] * k if labels is None else labels.chunk(k)
        return zip(x.chunk(k), parts, strict=True)

    def _changed(self, x: Tensor, generator: Generator) -> Tensor:
        """T(x)."""
        return augment(x, self.config.augment, self.config.augment_probability, generator)

    def _seen(self, real_logits: Tensor, fake_logits: Tensor) -> Metrics:
        real, fake = real_logits.float(), fake_logits.float()
        if self.config.loss in CLASSIFIES:
            return {"p_real": real.sigmoid().mean(), "p_fake": fake.sigmoid().mean()}
        return {"gap": real.mean() - fake.mean()}

    @torch.no_grad()
    def sample(self, n: int, generator: Generator) -> Tensor:
        decoded = in_latent_chunks(n, lambda size: self._any_latents(size, generator), self.g)
        return to_uint8((decoded + 1) / 2)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        if self.config.loss in CLASSIFIES:
            return state_of_the_game(metrics, self.config.real_label)
        if metrics["gap"] <= 0:
            return [
                f"the discriminator holds drawn images for more real than real ones (by {-metrics['gap']:.3g}): it has"
                " stopped learning"
            ]
        return []

    @torch.no_grad()
    def export(self, generator: Generator) -> tuple[nn.Module, Tensor]:
        """G with frozen batch statistics, latents (B, d), with classes (B, d + K) -> images (B, C, H, W) in [0, 1]."""
        frozen = with_frozen_statistics(self.g, lambda n: self._any_latents(n, generator))
        return nn.Sequential(frozen, CentredToUnit()).eval(), self._any_latents(2, generator)

    def _latents(self, n: int, generator: Generator, labels: Tensor | None) -> Tensor:
        """z ~ U(-1, 1), (n, d), and the one-hot labels behind it, (n, d + K)."""
        z = torch.rand(n, self.config.latent, generator=generator, device=generator.device) * 2 - 1
        return z if labels is None else torch.cat([z, labels], dim=1)

    def _any_latents(self, n: int, generator: Generator) -> Tensor:
        """Each of a class drawn evenly."""
        classes = self.config.classes
        return self._latents(n, generator, one_hot(even_labels(n, classes, generator), classes))


def state_of_the_game(metrics: Mapping[str, float], real_label: float = 1.0) -> list[str]:
    """What `p_real` and `p_fake` tell of G and D, in a sentence where it is wrong. `real_label`: what D is to say."""
    p_real, p_fake = metrics["p_real"], metrics["p_fake"]
    seen = f"(D says {p_real:.0%} of real and {p_fake:.0%} of drawn images are real)"
    if p_real > D_CERTAIN * real_label and p_fake < 1 - D_CERTAIN:
        return [f"the discriminator is certain of nearly every image {seen}: the generator learns little from it"]
    if p_fake > FOOLED:
        return [f"the generator fools the discriminator {seen}: it has found a blind spot or D has stopped learning"]
    if p_real - p_fake < BLIND:
        return [f"the discriminator sees no difference between real and drawn images {seen}: D has stopped learning"]
    return []


def build(config: Config, shape: ImageShape) -> DCGAN:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: impossible settings."""
    require_at_least_one(config, "latent", "generator_width", "discriminator_width")
    config.check()
    return DCGAN(config, shape)
