"""VAE: Kingma & Welling, "Auto-Encoding Variational Bayes", 2013, arXiv 1312.6114 (equation numbers from there), §5.

    q(z|x) = N(z; mu(x), sigma(x)^2 I),  p(z) = N(0, I)                                                       eq. 9
    z^l = mu + sigma * eps^l,  eps^l ~ N(0, I),  l = 1..L
    ELBO(x) = 1/2 sum_j (1 + log sigma_j^2 - mu_j^2 - sigma_j^2) + 1/L sum_l log p(x|z^l)                      eq. 10
    loss = -mean over the batch of ELBO(x) + |theta|^2 / (2 N)                                               eq. 8, MAP

Encoder h = tanh(W3 x + b3), mu = W4 h + b4, log sigma^2 = W5 h + b5; decoder h = tanh(W1 z + b1) and then
Bernoulli (appendix C.1): log p(x|z) = sum_i x_i log y_i + (1 - x_i) log(1 - y_i),  y = sigmoid(W2 h + b2), or
Gaussian  (appendix C.2): log p(x|z) = sum_i log N(x_i; m_i, s_i^2),  m = sigmoid(W2 h + b2), log s^2 = W6 h + b6.

ELBO <= IW_K(x) = E log 1/K sum_k p(x, z^k) / q(z^k|x) <= log p(x): the tighter bound of Burda, Grosse, Salakhutdinov
2015 (arXiv 1509.00519, eq. 8), of the same K draws as the ELBO when evaluating.

Shape legend: B batch, C channels, H, W sides, P = C*H*W pixels, h hidden units, D latent dimensions, L or K draws of z.

What the pixels are. All values are nats an image, of one of these:
- `dynamic` (default): every time an image is trained on, each pixel becomes 1 with probability value/255. When
  evaluating, the uniform number behind a pixel is a hash of the image's own bytes and the pixel's place: the test split
  is binarised by fixed noise, the same on every device, in any order and batch size. So the number is a likelihood of
  binary images, and reproducible. It compares with others who binarise by sampling, up to the luck of one draw; not
  with `threshold`; and not to the last digit with Larochelle's fixed files, which are another draw.
- `threshold`: 1 where the value is 128 or more, in training and evaluation. Less random images, hence higher
  likelihoods, which compare only among themselves.
- Gaussian: pixels become (value + u) / 256 with u ~ U(0, 1), hashed as above when evaluating, and P log 256 is
  subtracted: the ELBO is then a bound on the log-probability of the 8-bit image; `bits_per_dim` = -ELBO / (P ln 2).
Grey values are never targets of a Bernoulli: the result would be no likelihood and compare with nothing.

Deviations
- `layers`, `activation` and `optimizer` can be others than the paper's one tanh layer under Adagrad, for a short run
  that shows digits: two layers of rectified units under Adam (the recipe vae-demo). The defaults are the paper's.
- The paper's "N(0, 0.01)" for all first parameters, biases too, can be read as variance or as standard deviation. Here
  it is the variance, as in the paper's other N(., .): `init_std` = .1; docs/models/vae.md has figures of both.
- The paper picks Adagrad's step from {.01, .02, .1} by the first iterations; here it is a setting.
- log sigma^2 and log s^2 are bounded to (-15, 15) by 15 tanh(./15), nearly the identity below 5: an unbounded one
  overflows exp() when Adagrad's first, largest steps meet 784 inputs at once.
- The Gaussian decoder is trained on dequantised pixels; the paper takes Frey Face's values as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Adagrad, Adam, Optimizer

from models.contract import Batch, ImageShape, Metrics, Traversal
from models.layers import in_latent_chunks, require_at_least_one, to_uint8, to_unit

LOG_VARIANCE_BOUND = 15.0
COLLAPSED_KL = 0.05  # nats: below it z tells the decoder less than a tenth of a bit about the image
LOG_2PI = math.log(2 * math.pi)
WALK = 3.0  # standard deviations of the prior: a traversal walks from -3 to 3


@dataclass(frozen=True)
class Config:
    """What a VAE is made of; the defaults are the paper's for MNIST."""

    latent: int = 20
    """D, dimensions of z."""
    hidden: int = 500
    """h, units of a hidden layer of the encoder and of the decoder."""
    layers: int = 1
    """Hidden layers of the encoder and of the decoder, each."""
    activation: Literal["tanh", "relu"] = "tanh"
    """What follows a hidden layer."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """p(x|z): bernoulli for images that are binarised, gaussian for 8-bit grey or colour images."""
    binarize: Literal["dynamic", "threshold"] = "dynamic"
    """How 8-bit pixels become 0 or 1 under bernoulli: sampled with probability value/255, or 1 from value 128 on."""
    draws: int = 1
    """L, draws of z an image and training step."""
    evaluation_draws: int = 10
    """K, draws of z an image when evaluating: of the ELBO's average and of the importance-weighted bound."""
    optimizer: Literal["adagrad", "adam"] = "adagrad"
    """adagrad as in the paper; adam gets further in a short run."""
    learning_rate: float = 0.02
    """Step size; the paper's for Adagrad are .01, .02 and .1. Adam wants about .001."""
    prior_images: int = 60_000
    """N, images of the training split: the prior N(0, I) on all parameters weighs 1/N of an image. 0 leaves it out."""
    init_std: float | None = 0.1
    """Standard deviation of all parameters at the start; None: as torch draws them, uniform within 1/sqrt(inputs)."""


class Encoder(nn.Module):
    """x (B, P) -> mu, log sigma^2, both (B, D)."""

    def __init__(self, config: Config, pixels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(pixels, config.hidden)
        self.deeper = deeper(config)
        self.mu = nn.Linear(config.hidden, config.latent)
        self.log_var = nn.Linear(config.hidden, config.latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.deeper(self.hidden(x))
        return self.mu(h).float(), bounded(self.log_var(h).float())


class BernoulliDecoder(nn.Module):
    """z (…, D) -> logits of y, (…, P)."""

    def __init__(self, config: Config, pixels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.latent, config.hidden)
        self.deeper = deeper(config)
        self.logits = nn.Linear(config.hidden, pixels)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(self.deeper(self.hidden(z))).float()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """x (B, P) of 0 and 1, z (K, B, D) -> log p(x|z), nats, (K, B)."""
        return bernoulli_log_likelihood(x, self(z))

    def mean(self, z: Tensor) -> Tensor:
        """z (B, D) -> E[x|z] in [0, 1], (B, P)."""
        return self(z).sigmoid()


class GaussianDecoder(nn.Module):
    """z (…, D) -> m in (0, 1) and log s^2, both (…, P)."""

    def __init__(self, config: Config, pixels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.latent, config.hidden)
        self.deeper = deeper(config)
        self.location = nn.Linear(config.hidden, pixels)
        self.log_var = nn.Linear(config.hidden, pixels)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        h = self.deeper(self.hidden(z))
        return self.location(h).float().sigmoid(), bounded(self.log_var(h).float())

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """x (B, P) in (0, 1), z (K, B, D) -> log-probability of the 8-bit image, nats, (K, B)."""
        m, log_var = self(z)
        return gaussian_log_likelihood(x, m, log_var) - x.shape[-1] * math.log(256)

    def mean(self, z: Tensor) -> Tensor:
        """z (B, D) -> E[x|z] in [0, 1], (B, P)."""
        return self(z)[0]


def deeper(config: Config) -> nn.Sequential:
    """What follows the first linear map of an encoder or a decoder: its activation, and the further hidden layers."""
    activation = nn.Tanh if config.activation == "tanh" else nn.ReLU
    further = ((nn.Linear(config.hidden, config.hidden), activation()) for _ in range(config.layers - 1))
    return nn.Sequential(activation(), *chain.from_iterable(further))


def bounded(log_variance: Tensor) -> Tensor:
    """Into (-15, 15), smoothly: exp of it, and of its negative, stay finite."""
    return LOG_VARIANCE_BOUND * torch.tanh(log_variance / LOG_VARIANCE_BOUND)


def bernoulli_log_likelihood(x: Tensor, logits: Tensor) -> Tensor:
    """x (B, P), logits (…, B, P) -> sum_i x_i log y_i + (1 - x_i) log(1 - y_i), nats, (…, B)."""
    return (x * logits - F.softplus(logits)).sum(-1)


def gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """All (…, P), broadcast -> sum_i log N(x_i; mean_i, exp(log_variance_i)), nats, (…)."""
    return -0.5 * (LOG_2PI + log_variance + (x - mean) ** 2 * torch.exp(-log_variance)).sum(-1)


def kl_to_prior(mu: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mu, sigma^2 I) || N(0, I)) = -1/2 sum_j (1 + log sigma_j^2 - mu_j^2 - sigma_j^2), nats, (B, D) -> (B,)."""
    return -0.5 * (1 + log_variance - mu**2 - log_variance.exp()).sum(-1)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """log w_k = log p(x, z^k) - log q(z^k|x), (K, B) -> log 1/K sum_k w_k, (B,)."""
    return torch.logsumexp(log_weights, dim=0) - math.log(len(log_weights))


def pixel_noise(images: Tensor) -> Tensor:
    """uint8 (B, P) -> numbers uniform in [0, 1), (B, P): a hash of the image's bytes and the pixel's place.

    In integers, so that they are the same on every device, in every batch and in every version of torch."""
    place = torch.arange(1, images.shape[1] + 1, dtype=torch.int64, device=images.device)
    own = _mix((images.to(torch.int64) * _mix(place)).sum(1, keepdim=True))
    return (_mix(own + place) & 0xFFFFFF).to(torch.float32) / 2**24


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 that wraps around."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class VAE:
    """The learner: an encoder and a decoder under one optimiser."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        self.config, self.shape = config, shape
        self.pixels = shape.channels * shape.height * shape.width
        decoder = BernoulliDecoder if config.likelihood == "bernoulli" else GaussianDecoder
        self.encoder = Encoder(config, self.pixels)
        self.decoder = decoder(config, self.pixels)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        if config.init_std is not None:
            for parameter in parameters:
                nn.init.normal_(parameter, 0.0, config.init_std)
        decay = 1 / config.prior_images if config.prior_images else 0.0
        rule = Adagrad if config.optimizer == "adagrad" else Adam
        self.optimizer = rule(parameters, lr=config.learning_rate, weight_decay=decay)

    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"vae": self.optimizer}

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        x = self._observed(batch.images, generator)
        log_likelihood, kl = self._terms(x, self.config.draws, generator)[:2]
        elbo = (log_likelihood.mean(0) - kl).mean()

        self.optimizer.zero_grad(set_to_none=True)
        (-elbo).backward()
        self.optimizer.step()
        return {"elbo": elbo.detach(), "log_likelihood": log_likelihood.detach().mean(), "kl": kl.detach().mean()}

    @torch.no_grad()
    def evaluate(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """Nats an image, (B,) each: elbo = log_likelihood - kl, and iw_bound, all of the same K draws."""
        x = self._observed(batch.images, None)
        log_likelihood, kl, log_weights = self._terms(x, self.config.evaluation_draws, generator)
        elbo = log_likelihood.mean(0) - kl
        values = {"elbo": elbo, "log_likelihood": log_likelihood.mean(0), "kl": kl}
        values["iw_bound"] = importance_weighted_bound(log_weights)
        if self.config.likelihood == "gaussian":
            values["bits_per_dim"] = -elbo / (self.pixels * math.log(2))
        return values

    @torch.no_grad()
    def sample(self, n: int, generator: Generator) -> Tensor:
        """The decoder's means, as grey or colour, of z from the prior."""
        return to_uint8(self._images(in_latent_chunks(n, lambda size: self._prior(size, generator), self.decoder.mean)))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, generator: Generator) -> Tensor:
        """The decoder's mean at z = mu(x), where x is what `evaluate` makes of the images; draws nothing."""
        mu, _ = self.encoder(self._observed(images, None))
        return to_uint8(self._images(self.decoder.mean(mu)))

    @torch.no_grad()
    def traverse(self, rows: int, steps: int, generator: Generator) -> Traversal:
        """Each row walks one coordinate of z from -3 to 3 in even steps; the others as drawn.

        The coordinates are those to which the decoder's first layer gives the largest weights, largest first; each row
        has a draw of its own. With D = 2 the rows walk the other coordinate, both in equal shares of the prior: the
        paper's map of it (figure 4)."""
        if self.config.latent == 2:
            axes = _quantiles(rows, generator.device), _quantiles(steps, generator.device)
            across = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
            images = self._images(self.decoder.mean(across.flatten(0, 1)))
        else:
            z = self._prior(rows, generator)[:, None, :].repeat(1, steps, 1)
            order = self.decoder.hidden.weight.norm(dim=0).argsort(descending=True)
            for row in range(rows):
                z[row, :, order[row % len(order)]] = torch.linspace(-WALK, WALK, steps, device=generator.device)
            images = self._images(self.decoder.mean(z.flatten(0, 1)))
        return Traversal(to_uint8(images).unflatten(0, (rows, steps)), [""] * rows)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        if metrics["kl"] < COLLAPSED_KL:
            return [
                f"the posterior has collapsed onto the prior (KL {metrics['kl']:.3f} nats): the decoder ignores z and"
                " draws one average image; early in training this passes, later only a restart helps"
            ]
        return []

    @torch.no_grad()
    def export(self, generator: Generator) -> tuple[nn.Module, Tensor]:
        """The decoder's mean, z (B, D) -> images (B, C, H, W) in [0, 1]."""
        return DecoderMean(self.decoder, self.shape).eval().requires_grad_(False), self._prior(2, generator)

    def _observed(self, images: Tensor, generator: Generator | None) -> Tensor:
        """uint8 (B, C, H, W) -> x (B, P); the noise is `generator`'s, or hashed from the images when there is none."""
        flat = images.flatten(1)
        if self.config.likelihood == "bernoulli" and self.config.binarize == "threshold":
            return (flat >= 128).to(torch.float32)
        noise = (
            pixel_noise(flat) if generator is None else torch.rand(flat.shape, generator=generator, device=flat.device)
        )
        if self.config.likelihood == "bernoulli":
            return (noise < to_unit(flat)).to(torch.float32)
        return (flat + noise) / 256

    def _terms(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, P) -> log p(x|z^k) (K, B), KL(q||p) (B,), log w_k = log p(x, z^k) - log q(z^k|x) (K, B)."""
        mu, log_var = self.encoder(x)
        eps = torch.randn(draws, *mu.shape, generator=generator, device=mu.device)
        z = mu + torch.exp(0.5 * log_var) * eps
        log_likelihood = self.decoder.log_likelihood(x, z)
        log_prior = gaussian_log_likelihood(z, torch.zeros_like(mu), torch.zeros_like(mu))
        log_weights = log_likelihood + log_prior - gaussian_log_likelihood(z, mu, log_var)
        return log_likelihood, kl_to_prior(mu, log_var), log_weights

    def _prior(self, n: int, generator: Generator) -> Tensor:
        """z ~ N(0, I), (n, D)."""
        return torch.randn(n, self.config.latent, generator=generator, device=generator.device)

    def _images(self, flat: Tensor) -> Tensor:
        return flat.unflatten(1, (self.shape.channels, self.shape.height, self.shape.width))


class DecoderMean(nn.Module):
    """z (B, D) -> E[x|z] as images (B, C, H, W) in [0, 1]: what `export` publishes."""

    def __init__(self, decoder: BernoulliDecoder | GaussianDecoder, shape: ImageShape) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(decoder)
        self.size = (shape.channels, shape.height, shape.width)

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder.mean(z).unflatten(1, self.size)


def _quantiles(steps: int, device: torch.device) -> Tensor:
    """Coordinates from -WALK to WALK at equal steps of the prior's distribution function, (steps,)."""
    ends = torch.special.ndtr(torch.tensor([-WALK, WALK], device=device))
    return torch.special.ndtri(torch.linspace(float(ends[0]), float(ends[1]), steps, device=device))


def build(config: Config, shape: ImageShape) -> VAE:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: impossible sizes."""
    require_at_least_one(config, "latent", "hidden", "layers", "draws", "evaluation_draws")
    return VAE(config, shape)
