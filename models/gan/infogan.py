"""InfoGAN: Chen, Duan, Houthooft, Schulman, Sutskever, Abbeel, "InfoGAN: Interpretable Representation Learning by
Information Maximizing Generative Adversarial Nets", 2016, arXiv 1606.03657; released code openai/InfoGAN (MNIST only).

The generator is given, beside noise z, codes c that an image must show, so that Q can read them off it again:

    z ~ U(-1, 1)^d,   c = K categorical codes, uniform over n_k categories, and N continuous ones, U(-1, 1) each
    L_I(G, Q) = E[log Q(c | G(z, c))] + H(c)  <=  I(c; G(z, c)),    H(c) = sum_k log n_k + N log 2
    L_D = -mean log D(x) - mean log(1 - D(G(z, c)))  -  lambda L_I
    L_G = -mean log D(G(z, c))                       -  lambda L_I

    Q(c_k | x) = softmax of n_k logits;   Q(c_n | x) = N(mu_n(x), sigma_n^2), sigma_n = 1 or learned
    G: (z, c) -> FC h, BN, ReLU -> FC to (m, base, base), BN, ReLU -> 4x4 stride-2 transposed convolutions that halve
       the channels and double the side, BN and ReLU after each -> C channels at the full side, sigmoid.
    D, Q: 4x4 stride-2 convolutions that double the channels from ndf and halve the side down to base, BN after each
       but the first, LeakyReLU -> FC h, BN, LeakyReLU -> D: one logit;  Q: FC 128, BN, LeakyReLU -> P numbers.
    stages = log2(side / base):  base 7 and 2 stages at 28x28 (the paper's MNIST networks), base 4 at 32x32, 64x64, ...

Q shares everything with D but the last layers, lives among D's parameters and has D's step: L_I trains G in G's update,
and Q and the shared layers in D's. Real and drawn images pass D in separate batches, each normalised by its own kind.

Shape legend: B batch, C channels, H = W side, d noise, K categorical and N continuous codes, L all numbers of a latent:
noise, then the categorical codes as one-hots, then the continuous ones. P what Q says of an image: the logits of all
categorical codes, N means and, where they are learned, N log-variances. h hidden units, m widest feature map.

What L_I is. Of categorical codes it is a bound in nats, limited by H(c): log 10 = 2.30 for the digits. Of a continuous
code it is a difference of differential entropies: with sigma fixed at 1 a perfect reader has -1/2 log(2 pi) + log 2
= -.226 and one that ignores the image -.392; with a learned sigma, ignoring the image gives -.176.

Deviations
- The slope of the leaky ReLU is .1, as the paper's text says; the code's .01 left narrow networks at patterns that no
  eye takes for digits, but that Q can read (docs/models/infogan.md).
- H of a continuous code is log 2; the code takes a constant of the same role from N(0, 1). No gradient depends on it.
- A learned log-variance is bounded to (-5, 5) by 5 tanh(./5): else G could buy L_I without end by invisible precision.
- One step updates D and then G on one batch and the same z; the code draws new z for G, and guards logarithms by 1e-8
  where here losses are made of logits.
- No running averages: batch statistics when sampling too (chunks of 128 latents), as for DCGAN here; the code has some.
- Nets for other sides than 28 follow the formula above; the paper has tables of its own for each data set.
- Grey images are in [0, 1], as in the code; colour images come to D as 2x - 1. G ends in a sigmoid for both.
- Q reads held-out images with the statistics of their own batch, as D is shown real ones; those of drawn images read
  far worse where D tells the two kinds well apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Generator, Tensor, nn
from torch.optim import Adam, Optimizer

from models.contract import Batch, ImageShape, Metrics, Traversal
from models.gan.codes import Codes, told_of_factors
from models.gan.dcgan import state_of_the_game
from models.gan.dcgan_networks import initialise
from models.gan.losses import cross_entropy, non_saturating
from models.layers import (
    in_latent_chunks,
    require_at_least_one,
    require_share,
    to_uint8,
    to_unit,
    with_frozen_statistics,
)
from models.metrics.disentanglement import majority_accuracy

BASES = (4, 7)  # sides of the smallest feature map
BN_EPS = 1e-5
LOG_VARIANCE_BOUND = 5.0
FACTORS = "factors"  # name of the column that says what an image was made from

LOG_2, LOG_2PI = math.log(2), math.log(2 * math.pi)
UNREAD_FIXED = LOG_2 - 0.5 * LOG_2PI - 1 / 6  # L_I of a continuous code whose reader always says N(0, 1)
UNREAD_LEARNED = LOG_2 - 0.5 * math.log(2 * math.pi * math.e / 3)  # … and N(0, 1/3), the best that ignores the image
HARDLY_READ = 0.05  # of H(c) of the categorical codes: below it they are as good as ignored
BARELY_MORE = 0.01  # nats a continuous code


@dataclass(frozen=True)
class Config:
    """What an InfoGAN is made of; the defaults are the paper's for MNIST."""

    noise: int = 62
    """d, how many uniform random numbers are not read back."""
    categories: tuple[int, ...] = (10,)
    """n_k, number of categories of each categorical code."""
    continuous: int = 2
    """N, how many continuous codes, each uniform in (-1, 1)."""
    names: tuple[str, ...] = ()
    """Names of the codes in pictures and figures, categorical ones first; codes beyond them are called c1, c2, …"""
    generator_width: int = 64
    """Channels of the generator's last hidden feature map; each earlier one has twice as many."""
    discriminator_width: int = 64
    """ndf: channels of the discriminator's first feature map; each later one has twice as many."""
    hidden: int = 1024
    """h, units of the fully connected layer of G, and of D and Q; 0 leaves it out."""
    recognition_hidden: int = 128
    """Units of the hidden layer that is Q's own."""
    leak: float = 0.1
    """Slope of D's leaky ReLU below zero: the one in the paper's text; the released code has .01."""
    learned_deviation: bool = False
    """Q says a standard deviation for each continuous code, instead of 1 for all."""
    categorical_weight: float = 1.0
    """lambda of the categorical codes."""
    continuous_weight: float = 1.0
    """lambda of the continuous codes."""
    discriminator_rate: float = 2e-4
    """Adam's step size, of D and Q."""
    generator_rate: float = 1e-3
    """Adam's step size, of G."""
    beta1: float = 0.5
    """Adam's decay rate of the gradient's running mean."""
    beta2: float = 0.999
    """Adam's decay rate of the squared gradient's running mean."""

    @property
    def codes(self) -> Codes:
        return Codes(self.noise, tuple(self.categories), self.continuous, tuple(self.names))


class GeneratorNetwork(nn.Module):
    """G: latents (B, L) -> images (B, C, side, side) in [0, 1]."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        super().__init__()
        self.base, stages = _plan(shape)
        widths = [config.generator_width * 2**i for i in reversed(range(stages))]
        inputs, flat = sum(config.codes.widths), widths[0] * self.base**2
        hidden = _full(inputs, config.hidden, nn.ReLU()) if config.hidden else []
        self.project = nn.Sequential(*hidden, *_full(config.hidden or inputs, flat, nn.ReLU()))
        layers = (
            (nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False), _norm(nn.BatchNorm2d, narrow), nn.ReLU())
            for wide, narrow in pairwise(widths)
        )
        last = nn.ConvTranspose2d(widths[-1], shape.channels, 4, 2, 1)
        self.upsample = nn.Sequential(*chain.from_iterable(layers), last, nn.Sigmoid())
        self.apply(initialise)

    def forward(self, latents: Tensor) -> Tensor:
        return self.upsample(self.project(latents).unflatten(1, (-1, self.base, self.base)))


class DiscriminatorNetwork(nn.Module):
    """D and Q: images (B, C, side, side) in [0, 1] -> logits (B,), positive for "real", and Q's parameters (B, P)."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        super().__init__()
        base, stages = _plan(shape)
        widths = [config.discriminator_width * 2**i for i in range(stages)]
        self.centred = shape.channels > 1
        leak = nn.LeakyReLU(config.leak)
        layers = (
            (nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), _norm(nn.BatchNorm2d, wide), leak)
            for narrow, wide in pairwise(widths)
        )
        first, flat = nn.Conv2d(shape.channels, widths[0], 4, 2, 1), widths[-1] * base**2
        hidden = _full(flat, config.hidden, leak) if config.hidden else []
        self.shared = nn.Sequential(first, leak, *chain.from_iterable(layers), nn.Flatten(), *hidden)
        features, own = config.hidden or flat, config.recognition_hidden
        said = sum(config.categories) + config.continuous * (2 if config.learned_deviation else 1)
        self.judge = nn.Linear(features, 1)
        self.recognise = nn.Sequential(*_full(features, own, leak), nn.Linear(own, said))
        self.apply(initialise)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.shared(2 * x - 1 if self.centred else x)
        return self.judge(features).squeeze(1).float(), self.recognise(features).float()


def _full(inputs: int, outputs: int, activation: nn.Module) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs, bias=False), _norm(nn.BatchNorm1d, outputs), activation]


def _norm(kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d], width: int) -> nn.Module:
    return kind(width, eps=BN_EPS, track_running_stats=False)


def _plan(shape: ImageShape) -> tuple[int, int]:
    """Side of the smallest feature map, and how often it is doubled to reach the side."""
    for base in BASES:
        stages = (shape.height // base).bit_length() - 1
        if shape.height == shape.width == base * 2**stages and stages >= 1:
            return base, stages
    raise ValueError(
        f"InfoGAN draws square images of side 8, 16, 32, 64, … or 14, 28, 56, …, not {shape.height}x{shape.width};"
        " ingest the data set at one of these sizes"
    )


def log_q_categorical(one_hot: Tensor, logits: Tensor) -> Tensor:
    """log Q(c_k | x), nats; both (B, n_k) -> (B,)."""
    return (one_hot * logits.log_softmax(1)).sum(1)


def log_q_continuous(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(c; mean, exp(log_variance)), nats, summed over the codes; all (B, N) -> (B,)."""
    return -0.5 * (LOG_2PI + log_variance + (values - mean) ** 2 * torch.exp(-log_variance)).sum(1)


class InfoGAN:
    """The learner: two networks, two optimisers, one update of each per batch."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        self.config, self.codes = config, config.codes
        self.g = GeneratorNetwork(config, shape)
        self.d = DiscriminatorNetwork(config, shape)
        betas = (config.beta1, config.beta2)
        self.optimizer_g = Adam(self.g.parameters(), lr=config.generator_rate, betas=betas)
        self.optimizer_d = Adam(self.d.parameters(), lr=config.discriminator_rate, betas=betas)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.g, "discriminator": self.d}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": self.optimizer_g, "discriminator": self.optimizer_d}

    def check_share(self, images: int) -> None:
        require_share(images, 2, "batch norm needs")

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        x = to_unit(batch.images)
        latents = self.codes.latents(len(x), generator)
        fake = self.g(latents)

        self.optimizer_d.zero_grad(set_to_none=True)
        real_logits, _ = self.d(x)
        fake_logits, said = self.d(fake.detach())
        loss_d = cross_entropy(real_logits, fake_logits)
        bounds = self._bounds(latents, said)
        (loss_d - self._weighted(bounds)).backward()
        self.optimizer_d.step()

        self.optimizer_g.zero_grad(set_to_none=True)
        self.d.requires_grad_(False)  # the generator's losses pass through D and Q without making gradients for them
        judged, read = self.d(fake)
        loss_g = non_saturating(judged)
        (loss_g - self._weighted(self._bounds(latents, read))).backward()
        self.d.requires_grad_(True)
        self.optimizer_g.step()

        metrics = {
            "loss_d": loss_d.detach(),
            "loss_g": loss_g.detach(),
            "p_real": real_logits.detach().sigmoid().mean(),
            "p_fake": fake_logits.detach().sigmoid().mean(),
            "mi_bound": torch.stack([*bounds.values()]).detach().sum(0).mean(),
            "code_entropy": loss_d.new_tensor(sum(self.codes.entropies.values())),
        }
        for kind, bound in bounds.items():
            metrics |= {
                f"mi_{kind}": bound.detach().mean(),
                f"entropy_{kind}": bound.new_tensor(self.codes.entropies[kind]),
            }
        return metrics

    def _bounds(self, latents: Tensor, said: Tensor) -> dict[str, Tensor]:
        """log Q(c|x) + H(c) of each kind of code, nats, (B,) each; latents (B, L), what Q says of the images (B, P)."""
        c = self.config
        _, *one_hots, values = latents.split(self.codes.widths, dim=1)
        *logits, rest = self._said(said)
        mean, log_variance = rest[:, : c.continuous], rest[:, c.continuous :]
        if c.learned_deviation:
            log_variance = LOG_VARIANCE_BOUND * torch.tanh(log_variance / LOG_VARIANCE_BOUND)
        else:
            log_variance = torch.zeros_like(mean)
        log_q = {"continuous": log_q_continuous(values, mean, log_variance)}
        of_each = [log_q_categorical(*pair) for pair in zip(one_hots, logits, strict=True)]
        log_q["categorical"] = torch.stack(of_each or [torch.zeros_like(log_q["continuous"])]).sum(0)
        return {kind: log_q[kind] + entropy for kind, entropy in self.codes.entropies.items()}

    def _said(self, said: Tensor) -> tuple[Tensor, ...]:
        """Q's parameters (B, P) -> logits of each categorical code, and the rest: means and log-variances."""
        categories = self.config.categories
        return said.split([*categories, said.shape[1] - sum(categories)], dim=1)

    def _weighted(self, bounds: dict[str, Tensor]) -> Tensor:
        """lambda L_I, a scalar."""
        weights = {"categorical": self.config.categorical_weight, "continuous": self.config.continuous_weight}
        return torch.stack([weights[kind] * bound.mean() for kind, bound in bounds.items()]).sum()

    @torch.no_grad()
    def sample(self, n: int, generator: Generator) -> Tensor:
        return to_uint8(in_latent_chunks(n, lambda size: self.codes.latents(size, generator), self.g))

    @torch.no_grad()
    def evaluate(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """The bounds, nats, of as many drawn images as there are held-out ones, (B,) each."""

        def read(latents: Tensor) -> Tensor:
            return torch.stack([*self._bounds(latents, self.d(self.g(latents))[1]).values()], dim=1)

        values = in_latent_chunks(len(batch.images), lambda size: self.codes.latents(size, generator), read)
        return {"mi_bound": values.sum(1)} | {
            f"mi_{kind}": value for kind, value in zip(self.codes.entropies, values.unbind(1), strict=True)
        }

    @torch.no_grad()
    def encode(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """What Q reads off each image: the likeliest category, int64 (B,), and means of continuous codes, (B,)."""
        x = to_unit(batch.images)
        _, said = self.d(x if len(x) > 1 else x.repeat(2, 1, 1, 1))  # one image alone has no variance
        *logits, rest = self._said(said[: len(x)])
        codes = [*(part.argmax(1) for part in logits), *rest[:, : self.config.continuous].unbind(1)]
        return dict(zip(self.codes.names, codes, strict=True))

    def measure(self, codes: Mapping[str, Tensor], labels: Tensor, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """`category_accuracy` of the best categorical code, where the labels name two classes or more; what the
        continuous codes tell of the column `factors`, where there is one."""
        names, known, figures = self.codes.names, labels >= 0, {}
        categorical, continuous = names[: len(self.config.categories)], names[len(self.config.categories) :]
        if categorical and len(labels[known].unique()) > 1:
            of_each = [majority_accuracy(codes[name][known], labels[known]) for name in categorical]
            figures["category_accuracy"] = max(of_each)
        if continuous and FACTORS in columns:
            figures |= told_of_factors({name: codes[name] for name in continuous}, columns[FACTORS])
        return figures

    @torch.no_grad()
    def traverse(self, rows: int, steps: int, generator: Generator) -> Traversal:
        """One code a row, all else fixed: its first `steps` categories (white beyond its last), or from -2 to 2. When
        every code has had its row they come again, with another z.

        Drawn beside four times as many images of the priors, so that batch statistics are nearly those of samples."""
        names, categories = self.codes.names, self.config.categories
        starts = self.codes.latents(-(-rows // len(names)), generator)
        order = [row % len(names) for row in range(rows)]
        walks = [self.codes.walk(code, starts[row // len(names)], steps) for row, code in enumerate(order)]
        beside = self.codes.latents(4 * rows * steps, generator)
        images = to_uint8(self.g(torch.cat([*walks, beside]))[: rows * steps]).unflatten(0, (rows, steps))
        for row, code in enumerate(order):
            if code < len(categories):
                images[row, categories[code] :] = 255
        return Traversal(images, [names[code] for code in order])

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        unread = UNREAD_LEARNED if self.config.learned_deviation else UNREAD_FIXED
        least = {
            "categorical": HARDLY_READ * self.codes.entropies.get("categorical", 0.0),
            "continuous": self.config.continuous * (unread + BARELY_MORE),
        }
        return state_of_the_game(metrics) + [
            f"the {kind} codes are ignored (mi_{kind} is {metrics[f'mi_{kind}']:.3g} nats): Q cannot read them off the"
            " images; early in training this passes, later only a larger weight or a restart helps"
            for kind in self.codes.entropies
            if metrics[f"mi_{kind}"] < least[kind]
        ]

    @torch.no_grad()
    def export(self, generator: Generator) -> tuple[nn.Module, Tensor]:
        """G with frozen batch statistics, latents (B, L) -> images (B, C, H, W) in [0, 1]."""
        return with_frozen_statistics(self.g, lambda n: self.codes.latents(n, generator)), self.codes.latents(
            2, generator
        )


def build(config: Config, shape: ImageShape) -> InfoGAN:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: impossible sizes."""
    require_at_least_one(config, "noise", "generator_width", "discriminator_width", "recognition_hidden")
    if config.hidden < 0:
        raise ValueError(f"hidden is {config.hidden}; it must be 0, for no such layer, or more")
    for kind, codes in {"categorical": len(config.categories), "continuous": config.continuous}.items():
        weight = getattr(config, f"{kind}_weight")
        if weight < 0 or (weight != 1 and not codes):
            why = "it must not be negative" if codes else f"there are no {kind} codes that it could weigh"
            raise ValueError(f"{kind}_weight is {weight:g}; {why}")
    return InfoGAN(config, shape)
