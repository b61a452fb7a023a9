"""InfoGAN against the paper: the bound on the mutual information, its two losses, and codes that come back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F

from models.contract import Batch, ImageShape
from models.gan.infogan import (
    UNREAD_FIXED,
    UNREAD_LEARNED,
    Config,
    InfoGAN,
    build,
    log_q_categorical,
    log_q_continuous,
)

SMALL = Config(noise=4, categories=(3, 2), continuous=2, generator_width=4, discriminator_width=4, hidden=8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learner(config: Config = SMALL, side: int = 8, channels: int = 1, seed: int = 0) -> InfoGAN:
    torch.manual_seed(seed)
    return build(config, ImageShape(channels, side, side))


def some_batch(n: int = 8, side: int = 8, channels: int = 1) -> Batch:
    images = torch.randint(0, 256, (n, channels, side, side), generator=rng(11), dtype=torch.uint8)
    return Batch(images, torch.arange(n) % 2, 0)


# --- the bound --------------------------------------------------------------------------------------------------------


def test_the_entropy_of_the_codes() -> None:
    assert Config().codes.entropies == {"categorical": math.log(10), "continuous": 2 * math.log(2)}
    of_svhn = Config(categories=(10,) * 4, continuous=4).codes.entropies
    assert of_svhn == pytest.approx({"categorical": 4 * math.log(10), "continuous": 4 * math.log(2)})
    assert Config(categories=()).codes.entropies == {"continuous": 2 * math.log(2)}
    assert Config(categories=(3, 2), continuous=0).codes.entropies == pytest.approx({"categorical": math.log(6)})


def test_what_q_says_of_a_category_and_of_a_number() -> None:
    logits = 3 * torch.randn(5, 4, generator=rng())
    chosen = torch.tensor([0, 3, 1, 1, 2])
    torch.testing.assert_close(
        log_q_categorical(F.one_hot(chosen, 4).float(), logits), Categorical(logits=logits).log_prob(chosen)
    )
    values, mean, log_variance = (torch.randn(6, 3, generator=rng(seed)) for seed in (1, 2, 3))
    expected = Normal(mean, torch.exp(log_variance / 2)).log_prob(values).sum(1)
    torch.testing.assert_close(log_q_continuous(values, mean, log_variance), expected)
    by_hand = -0.5 * math.log(2 * math.pi) - 0.5 * (0.3 - 0.5) ** 2  # sigma = 1: the paper's for MNIST
    got = log_q_continuous(torch.tensor([[0.3]]), torch.tensor([[0.5]]), torch.zeros(1, 1))
    assert got.item() == pytest.approx(by_hand)


def said(logits: list[Tensor], mean: Tensor, log_variance: Tensor | None = None) -> Tensor:
    """What Q says of images, as one tensor (B, P)."""
    return torch.cat([*logits, mean, *([] if log_variance is None else [log_variance])], dim=1)


def drawn(model: InfoGAN, n: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """(latents, categories of each code, continuous codes)."""
    latents = model.codes.latents(n, rng(5))
    _, *one_hots, values = latents.split(model.codes.widths, dim=1)
    return latents, [one_hot.argmax(1) for one_hot in one_hots], values


def test_the_categorical_bound_is_never_above_the_entropy_and_tight_where_the_image_shows_the_code() -> None:
    model = learner()
    latents, (first, second), values = drawn(model, 600)
    entropy = math.log(3) + math.log(2)
    for seed in range(20):
        logits = [10 * torch.randn(600, n, generator=rng(seed)) for n in (3, 2)]
        assert model._bounds(latents, said(logits, values))["categorical"].max() <= entropy + 1e-6
    shown = [50.0 * F.one_hot(first, 3), 50.0 * F.one_hot(second, 2)]
    assert model._bounds(latents, said(shown, values))["categorical"].mean().item() == pytest.approx(entropy, abs=1e-6)
    blind = [torch.zeros(600, 3), torch.zeros(600, 2)]
    assert model._bounds(latents, said(blind, values))["categorical"].abs().max() < 1e-6


def test_the_bound_is_the_mutual_information_where_q_is_the_posterior_and_below_it_elsewhere() -> None:
    """An image that shows one of 4 categories rightly with probability .7, else any of the other three alike."""
    right, n = 0.7, 4
    channel = torch.full((n, n), (1 - right) / (n - 1)).fill_diagonal_(right)  # p(shown | c)
    joint = channel / n
    information = 0.0
    for c in range(n):
        for x in range(n):
            p = joint[c, x].item()
            information += p * math.log(p / (joint[c].sum().item() * joint[:, x].sum().item()))
    entropy = Config(categories=(n,), continuous=0).codes.entropies["categorical"]

    def bound(posterior: Tensor) -> float:  # (shown, category) -> E log Q + H(c), by summing over all pairs
        pairs = [(c, x) for c in range(n) for x in range(n)]
        one_hot = F.one_hot(torch.tensor([c for c, _ in pairs]), n).float()
        log_q = log_q_categorical(one_hot, posterior[[x for _, x in pairs]].log())
        return sum(joint[c, x].item() * q.item() for (c, x), q in zip(pairs, log_q, strict=True)) + entropy

    assert bound(channel.T) == pytest.approx(information, abs=1e-6)
    for seed in range(5):
        other = torch.rand(n, n, generator=rng(seed)) + 0.05
        assert bound(other / other.sum(1, keepdim=True)) < information


def test_the_bound_of_a_continuous_code_is_below_its_information_and_near_it_with_the_right_deviation() -> None:
    """x = c + noise of deviation .1: I = h(x) - h(noise), by numerical integration over x."""
    deviation = 0.1
    x = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    density = 0.5 * (torch.special.ndtr((x + 1) / deviation) - torch.special.ndtr((x - 1) / deviation))
    information = torch.trapezoid(-torch.xlogy(density, density), x).item() - 0.5 * math.log(
        2 * math.pi * math.e * deviation**2
    )
    model = learner(Config(noise=1, categories=(), continuous=1, generator_width=2, learned_deviation=True))
    latents, _, values = drawn(model, 50_000)
    seen = values + deviation * torch.randn(50_000, 1, generator=rng(3))

    def bound(log_variance: float) -> float:
        unbounded = 5 * math.atanh(log_variance / 5)  # what Q says is bounded by 5 tanh(./5)
        return model._bounds(latents, said([], seen, torch.full_like(seen, unbounded)))["continuous"].mean().item()

    best = bound(2 * math.log(deviation))
    assert information - 0.15 < best < information
    assert max(bound(2 * math.log(deviation) + change) for change in (-0.3, 0.3)) < best


def test_what_a_continuous_code_gains_that_nobody_reads_and_that_is_read_perfectly() -> None:
    for learned, unread, log_variance in ((False, UNREAD_FIXED, 0.0), (True, UNREAD_LEARNED, -math.log(3))):
        model = learner(Config(noise=1, categories=(), continuous=1, generator_width=2, learned_deviation=learned))
        latents, _, values = drawn(model, 100_000)
        variances = torch.full_like(values, 5 * math.atanh(log_variance / 5)) if learned else None
        ignoring = model._bounds(latents, said([], torch.zeros_like(values), variances))["continuous"]
        assert ignoring.mean().item() == pytest.approx(unread, abs=2e-3)
    model = learner(Config(noise=1, categories=(), continuous=1, generator_width=2))
    latents, _, values = drawn(model, 10)
    perfect = model._bounds(latents, said([], values))["continuous"]
    assert perfect.tolist() == pytest.approx([math.log(2) - 0.5 * math.log(2 * math.pi)] * 10)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_noise_and_codes_come_from_their_priors() -> None:
    model, n = learner(), 30_000
    latents, (first, second), values = drawn(model, n)
    assert latents.shape == (n, 4 + 3 + 2 + 2)
    one_hots = latents[:, 4:9]
    assert set(one_hots.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(one_hots[:, :3].sum(1), torch.ones(n)) and torch.equal(one_hots[:, 3:].sum(1), torch.ones(n))
    together = (first * 2 + second).bincount(minlength=6)  # uniform, and the two codes independent
    chi_square = ((together - n / 6) ** 2 / (n / 6)).sum().item()
    assert chi_square < 20.5, "the 99.9 % point for five degrees of freedom"
    for uniform in (latents[:, :4], values):
        assert -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() <= 1
        torch.testing.assert_close(uniform.mean(0), torch.zeros(uniform.shape[1]), atol=0.02, rtol=0)
        torch.testing.assert_close(uniform.var(0), torch.full((uniform.shape[1],), 1 / 3), atol=0.01, rtol=0)


# --- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
def test_the_step_is_adam_on_the_papers_losses_first_of_d_and_q_then_of_g(learned: bool) -> None:
    config = Config(
        noise=4,
        categories=(3, 2),
        continuous=2,
        generator_width=4,
        discriminator_width=4,
        hidden=8,
        learned_deviation=learned,
        categorical_weight=0.7,
        continuous_weight=0.2,
        discriminator_rate=0.01,
        generator_rate=0.03,
    )
    model, twin, batch = learner(config), learner(config), some_batch()
    metrics = model.step(batch, rng(9))

    latents = twin.codes.latents(8, rng(9))
    x, codes = batch.images.float() / 255, latents[:, 4:]

    def bounds(q: Tensor) -> tuple[Tensor, Tensor]:
        log_q = Categorical(logits=q[:, :3]).log_prob(codes[:, :3].argmax(1))
        log_q = log_q + Categorical(logits=q[:, 3:5]).log_prob(codes[:, 3:5].argmax(1))
        deviation = torch.exp(5 * torch.tanh(q[:, 7:] / 5) / 2) if learned else torch.ones(8, 2)
        of_values = Normal(q[:, 5:7], deviation).log_prob(codes[:, 5:]).sum(1)
        return log_q.mean() + math.log(6), of_values.mean() + 2 * math.log(2)

    def update(network: nn.Module, loss: Tensor, rate: float) -> None:
        parameters = [*network.parameters()]
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= rate * gradient / (gradient.abs() + 1e-8)  # Adam's first step

    fake = twin.g(latents)
    real_logits = twin.d(x)[0]
    fake_logits, q = twin.d(fake.detach())
    loss_d = -(torch.log(real_logits.sigmoid()).mean() + torch.log(1 - fake_logits.sigmoid()).mean())
    categorical, continuous = bounds(q)
    update(twin.d, loss_d - 0.7 * categorical - 0.2 * continuous, 0.01)
    judged, read = twin.d(fake)
    loss_g = -torch.log(judged.sigmoid()).mean()
    then_categorical, then_continuous = bounds(read)
    update(twin.g, loss_g - 0.7 * then_categorical - 0.2 * then_continuous, 0.03)

    for name, network in model.networks().items():
        for mine, theirs in zip(network.parameters(), twin.networks()[name].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0, msg=name)
    expected = {
        "loss_d": loss_d,
        "loss_g": loss_g,
        "mi_bound": categorical + continuous,
        "mi_categorical": categorical,
        "mi_continuous": continuous,
        "code_entropy": torch.tensor(math.log(6) + 2 * math.log(2)),
        "p_real": real_logits.sigmoid().mean(),
    }
    assert {name: metrics[name].item() for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )


def test_steps_and_decay_rates_are_the_papers() -> None:
    model = learner(Config(generator_width=2, discriminator_width=2, hidden=4))
    rates = {name: o.param_groups[0]["lr"] for name, o in model.optimizers().items()}
    assert rates == {"generator": 1e-3, "discriminator": 2e-4}
    assert all(o.param_groups[0]["betas"] == (0.5, 0.999) for o in model.optimizers().values())


def test_sizes_at_28_pixels_are_the_papers() -> None:
    model = learner(Config(), side=28)
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in model.networks().items()}
    g = 74 * 1024 + 2 * 1024 + 1024 * 6272 + 2 * 6272 + 128 * 64 * 16 + 2 * 64 + 64 * 16 + 1
    d = 16 * 64 + 64 + 64 * 128 * 16 + 2 * 128 + 6272 * 1024 + 2 * 1024 + 1024 + 1
    q = 1024 * 128 + 2 * 128 + 128 * 12 + 12
    assert count == {"generator": g, "discriminator": d + q}


@pytest.mark.parametrize(("side", "base"), [(28, 7), (14, 7), (8, 4), (32, 4), (64, 4)])
def test_sides_that_can_be_built(side: int, base: int) -> None:
    model = learner(Config(generator_width=2, discriminator_width=2, hidden=0), side=side, channels=3)
    assert model.g.base == base
    assert model.sample(2, rng()).shape == (2, 3, side, side)


@pytest.mark.parametrize(
    ("config", "shape", "words"),
    [
        (Config(), ImageShape(1, 30, 30), "side 8, 16, 32"),
        (Config(), ImageShape(1, 28, 32), "side 8, 16, 32"),
        (Config(categories=(10, 1)), ImageShape(1, 28, 28), "two categories or more"),
        (Config(categories=(), continuous=0), ImageShape(1, 28, 28), "one code or more"),
        (Config(continuous=-1), ImageShape(1, 28, 28), "continuous is -1"),
        (Config(hidden=-3), ImageShape(1, 28, 28), "hidden is -3"),
        (Config(categorical_weight=-1), ImageShape(1, 28, 28), "categorical_weight is -1; it must not be negative"),
        (Config(categories=(), categorical_weight=0.1), ImageShape(1, 28, 28), "there are no categorical codes"),
        (Config(continuous=0, continuous_weight=0.1), ImageShape(1, 28, 28), "there are no continuous codes"),
        (Config(names=("digit", "digit")), ImageShape(1, 28, 28), "all of them different"),
        (Config(names=("c2",)), ImageShape(1, 28, 28), "all of them different"),
        (Config(names=("a", "b", "c", "d")), ImageShape(1, 28, 28), "3 codes have a name each"),
    ],
)
def test_what_cannot_be_built_is_refused(config: Config, shape: ImageShape, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(config, shape)
