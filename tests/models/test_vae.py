"""The VAE against the paper, closed forms and numerical integration."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.optim import Adagrad

from models.contract import Batch, Evaluates, ImageShape, Reconstructs, Traverses
from models.vae.vae import (
    VAE,
    Config,
    bernoulli_log_likelihood,
    bounded,
    build,
    gaussian_log_likelihood,
    importance_weighted_bound,
    kl_to_prior,
    pixel_noise,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learner(config: Config, shape: ImageShape, seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return build(config, shape)


def batch(images: Tensor) -> Batch:
    return Batch(images, torch.zeros(len(images), dtype=torch.int64), 0)


def test_it_evaluates_reconstructs_and_traverses() -> None:
    model = learner(Config(), ImageShape(1, 28, 28))
    assert isinstance(model, Evaluates)
    assert isinstance(model, Reconstructs)
    assert isinstance(model, Traverses)


def test_likelihoods_are_those_of_torch() -> None:
    x, logits = (torch.rand(4, 9, generator=rng()) > 0.5).float(), 3 * torch.randn(2, 4, 9, generator=rng(1))
    torch.testing.assert_close(
        bernoulli_log_likelihood(x, logits), Bernoulli(logits=logits).log_prob(x.expand_as(logits)).sum(-1)
    )
    mean, log_var = torch.rand(4, 9, generator=rng(2)), torch.randn(4, 9, generator=rng(3))
    torch.testing.assert_close(
        gaussian_log_likelihood(x, mean, log_var), Normal(mean, torch.exp(log_var / 2)).log_prob(x).sum(-1)
    )


def test_a_bernoulli_that_is_sure_and_wrong_is_finite() -> None:
    assert bernoulli_log_likelihood(torch.ones(1, 1), torch.full((1, 1), -500.0)).item() == -500


def test_kl_is_the_closed_form_and_what_monte_carlo_says() -> None:
    mu, log_var = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[0.2, -1.5, 0.7]])
    q, p = Normal(mu, torch.exp(log_var / 2)), Normal(0.0, 1.0)
    exact = kl_to_prior(mu, log_var)
    torch.testing.assert_close(exact, kl_divergence(q, p).sum(-1))
    z = mu + torch.exp(log_var / 2) * torch.randn(200_000, 3, generator=rng())
    assert (q.log_prob(z) - p.log_prob(z)).sum(-1).mean().item() == pytest.approx(exact.item(), rel=0.01)
    assert kl_to_prior(torch.zeros(1, 5), torch.zeros(1, 5)).item() == 0


def test_importance_weighted_bound_is_the_log_of_the_mean_weight() -> None:
    weights = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    torch.testing.assert_close(importance_weighted_bound(weights.log()), torch.tensor([2.0, 4.0]).log())
    assert importance_weighted_bound(torch.full((3, 1), -2000.0)).item() == pytest.approx(-2000)


def test_no_log_variance_overflows() -> None:
    extreme = bounded(torch.tensor([-1e6, 0.0, 1e6]))
    assert extreme.exp().isfinite().all()
    assert (-extreme).exp().isfinite().all()
    near = torch.linspace(-2, 2, 9)
    torch.testing.assert_close(bounded(near), near, atol=0.02, rtol=0)


def test_noise_is_uniform_independent_and_the_images_own() -> None:
    images = torch.randint(0, 256, (2000, 36), generator=rng(), dtype=torch.uint8)
    u = pixel_noise(images)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(1 / 2, abs=0.005)
    assert u.var().item() == pytest.approx(1 / 12, rel=0.02)
    between_pixels = torch.corrcoef(u.T) - torch.eye(36)
    assert between_pixels.abs().max() < 5.5 / math.sqrt(2000)
    assert abs(torch.corrcoef(u[:2])[0, 1]) < 5 / math.sqrt(36)
    order = torch.randperm(2000, generator=rng(1))
    assert torch.equal(pixel_noise(images[order]), u[order])
    assert torch.equal(pixel_noise(images[:1]), u[:1])
    images[0, 0] ^= 1
    assert (pixel_noise(images[:1]) == u[:1]).float().mean() < 0.1


def test_noise_is_the_same_for_ever() -> None:
    """Published figures rest on it: these values were computed with Python integers, modulo 2^64."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    image = [0, 7, 255, 128]
    own = mix(sum(value * mix(place) for place, value in enumerate(image, start=1)) & mask)
    expected = [(mix((own + place) & mask) & 0xFFFFFF) / 2**24 for place in range(1, 5)]
    assert pixel_noise(torch.tensor([image], dtype=torch.uint8)).tolist() == [expected]


def seen_by_encoder(model: VAE) -> list[Tensor]:
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def test_dynamic_binarisation_is_redrawn_in_training_and_fixed_in_evaluation() -> None:
    model = learner(Config(hidden=4, latent=2), ImageShape(1, 16, 16))
    images = torch.tensor([0, 64, 191, 255], dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 16, 16)
    images[:, :, 0, 0] = torch.arange(4)[:, None]  # else hashes of even images
    seen = seen_by_encoder(model)
    generator = rng()
    for _ in range(2):
        model.step(batch(images), generator)
    model.evaluate(batch(images), generator)
    model.evaluate(batch(images.flip(0)), generator)
    first, second, fixed, reversed_ = seen
    for x in seen:
        assert set(x.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first, second)
    assert torch.equal(fixed, reversed_.flip(0))
    for x in (first, fixed):
        ones = x[:, 1:].mean(1)
        assert ones.tolist() == pytest.approx([0, 64 / 255, 191 / 255, 1], abs=0.12)
        assert (ones[0], ones[3]) == (0, 1)


def test_threshold_binarisation_is_at_half() -> None:
    model = learner(Config(hidden=4, latent=2, binarize="threshold"), ImageShape(1, 1, 4))
    images = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 1, 1, 4)
    seen = seen_by_encoder(model)
    model.step(batch(images), rng())
    model.evaluate(batch(images), rng())
    assert [x.tolist() for x in seen] == [[[0, 0, 1, 1]]] * 2


def all_binary_images() -> Tensor:
    bits = torch.tensor(list(product([0, 255], repeat=4)), dtype=torch.uint8)
    return bits.view(16, 1, 2, 2)


def log_evidence(model: VAE, x: Tensor) -> Tensor:
    """log p(x) of a model with one latent dimension: the integral over z as a sum on a fine grid."""
    z = torch.linspace(-9, 9, 6001, dtype=torch.float32)[:, None]
    log_prior = Normal(0.0, 1.0).log_prob(z)
    with torch.no_grad():
        log_joint = model.decoder.log_likelihood(x, z[:, None, :].expand(-1, len(x), -1)) + log_prior
    return torch.logsumexp(log_joint.double() + math.log(18 / 6000), dim=0)


def test_elbo_and_importance_bound_stay_below_the_evidence_and_the_latter_reaches_it() -> None:
    shape, images = ImageShape(1, 2, 2), all_binary_images()
    config = Config(latent=1, hidden=8, binarize="threshold", init_std=1.0, evaluation_draws=20_000)
    model = learner(config, shape)
    x = (images >= 128).float().flatten(1)
    evidence = log_evidence(model, x)
    assert evidence.exp().sum().item() == pytest.approx(1, abs=1e-3)  # a distribution over the 16 images

    values = model.evaluate(batch(images), rng())
    torch.testing.assert_close(values["elbo"], values["log_likelihood"] - values["kl"])
    assert (values["elbo"] < evidence).all()
    assert (evidence - values["elbo"]).max() > 0.5  # an untrained encoder: the gap is there to be seen

    trained = learner(config, shape)
    for step in range(200):
        trained.step(batch(images), rng(step))
    values, evidence = trained.evaluate(batch(images), rng()), log_evidence(trained, x)
    assert (values["elbo"] < evidence + 0.01).all()
    assert (values["elbo"] < values["iw_bound"] + 0.01).all()
    torch.testing.assert_close(values["iw_bound"].double(), evidence, atol=0.05, rtol=0)


def test_the_mean_of_the_bound_over_k_draws_rises_with_k() -> None:
    means = []
    for draws in (1, 5, 50):
        config = Config(latent=2, hidden=8, binarize="threshold", init_std=1.0, evaluation_draws=draws)
        values = learner(config, ImageShape(1, 2, 2)).evaluate(batch(all_binary_images().repeat(200, 1, 1, 1)), rng())
        means.append(values["iw_bound"].mean().item())
    assert means == sorted(means)
    assert means[0] < means[2] - 0.05


def test_the_gaussian_elbo_is_a_bound_on_a_distribution_over_256_values() -> None:
    """The sum over all values v of exp(bound on log P(v)) is at most 1, and nearly 1 where s spans many values."""
    model = learner(Config(latent=1, hidden=2, likelihood="gaussian", init_std=0.0), ImageShape(1, 1, 1))
    with torch.no_grad():
        model.decoder.log_var.bias.fill_(2 * math.log(0.1))  # N(1/2, .1^2), whatever z is: five s to either side
    u = (torch.arange(64) + 0.5) / 64
    values = (torch.arange(256)[:, None] + u) / 256
    bound = model.decoder.log_likelihood(values.reshape(-1, 1), torch.zeros(1, 256 * 64, 1)).view(256, 64).mean(1)
    assert bound.exp().sum().item() == pytest.approx(1, abs=1e-3)


def test_gaussian_pixels_are_dequantised_and_bits_are_counted_per_pixel() -> None:
    model = learner(Config(hidden=4, latent=2, likelihood="gaussian"), ImageShape(3, 8, 8))
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=rng(), dtype=torch.uint8)
    seen = seen_by_encoder(model)
    model.step(batch(images), rng())
    values = model.evaluate(batch(images), rng())
    for x in seen:
        assert torch.equal((x * 256).floor().to(torch.uint8), images.flatten(1))
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(values["bits_per_dim"], -values["elbo"] / (192 * math.log(2)))


def test_the_step_is_adagrad_on_the_mean_elbo_and_the_prior() -> None:
    config = Config(hidden=4, latent=2, draws=3, binarize="threshold", prior_images=50, learning_rate=0.1, init_std=0.3)
    shape, images = ImageShape(1, 2, 2), all_binary_images()
    model, twin = learner(config, shape), learner(config, shape)
    metrics = model.step(batch(images), rng(3))

    x = (images >= 128).float().flatten(1)
    mu, log_var = twin.encoder(x)
    z = mu + torch.exp(log_var / 2) * torch.randn(3, 16, 2, generator=rng(3))
    log_likelihood = Bernoulli(logits=twin.decoder(z)).log_prob(x.expand(3, 16, 4)).sum(-1).mean(0)
    kl = kl_divergence(Normal(mu, torch.exp(log_var / 2)), Normal(0.0, 1.0)).sum(-1)
    elbo = (log_likelihood - kl).mean()
    parameters = [*twin.encoder.parameters(), *twin.decoder.parameters()]
    loss = -elbo + sum(p.square().sum() for p in parameters) / (2 * 50)
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data -= 0.1 * gradient / (gradient.abs() + 1e-10)
    for mine, theirs in zip([*model.encoder.parameters(), *model.decoder.parameters()], parameters, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert metrics["elbo"].item() == pytest.approx(elbo.item(), rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(kl.mean().item(), rel=1e-4)
    assert metrics["log_likelihood"].item() == pytest.approx(log_likelihood.mean().item(), rel=1e-5)


def test_sizes_and_first_weights_are_the_papers() -> None:
    model = learner(Config(), ImageShape(1, 28, 28))
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in model.networks().items()}
    assert count == {"encoder": 785 * 500 + 2 * 501 * 20, "decoder": 21 * 500 + 501 * 784}
    everything = torch.cat([p.detach().flatten() for n in model.networks().values() for p in n.parameters()])
    assert everything.std().item() == pytest.approx(0.1, rel=0.01)
    assert everything.mean().item() == pytest.approx(0, abs=1e-3)
    assert type(model.optimizer) is Adagrad
    x, z = torch.rand(3, 784, generator=rng()), torch.randn(3, 20, generator=rng(1))
    (w3, b3, w4, b4, w5, b5), (w1, b1, w2, b2) = model.encoder.parameters(), model.decoder.parameters()
    h = torch.tanh(x @ w3.T + b3)
    mu, log_var = model.encoder(x)
    torch.testing.assert_close(mu, h @ w4.T + b4)
    torch.testing.assert_close(log_var, bounded(h @ w5.T + b5))
    torch.testing.assert_close(model.decoder(z), torch.tanh(z @ w1.T + b1) @ w2.T + b2)


def four_patterns() -> Tensor:
    """6x6 images, one half bright: upper, lower, left, right."""
    patterns = torch.zeros(4, 1, 6, 6, dtype=torch.bool)
    patterns[0, :, :3], patterns[1, :, 3:], patterns[2, :, :, :3], patterns[3, :, :, 3:] = True, True, True, True
    return patterns


def patterns_with_flips(n: int, seed: int) -> Tensor:
    """One of the four, each pixel flipped with probability .02; entropy log 4 + 36 H(.02) = 4.9 nats."""
    generator = rng(seed)
    chosen = four_patterns()[torch.randint(4, (n,), generator=generator)]
    flips = torch.rand(n, 1, 6, 6, generator=generator) < 0.02
    return (chosen ^ flips).to(torch.uint8) * 255


def test_low_rank_binary_data_is_learnt_drawn_and_given_back() -> None:
    train, test = patterns_with_flips(2000, seed=1), patterns_with_flips(500, seed=2)
    model = learner(
        Config(latent=2, hidden=32, learning_rate=0.1, prior_images=2000, init_std=0.01), ImageShape(1, 6, 6)
    )
    generator = rng(3)
    before = model.evaluate(batch(test), rng())["elbo"].mean().item()
    for _ in range(600):
        model.step(batch(train[torch.randint(2000, (50,), generator=generator)]), generator)
    after = {name: values.mean().item() for name, values in model.evaluate(batch(test), rng()).items()}
    assert before == pytest.approx(36 * math.log(0.5), abs=0.5)
    assert -12 < after["elbo"] < -4.9  # without z the pixels cost 36 log 2 = 25 nats; the entropy is the limit
    assert after["kl"] > 1  # which of four: log 4 nats
    again = model.reconstruct(test, rng()) >= 128
    assert (again != (test >= 128)).float().mean() < 0.06
    drawn = (model.sample(200, rng()) >= 128).flatten(1).float()
    wrong_pixels, nearest = torch.cdist(drawn, four_patterns().flatten(1).float()).square().min(1)
    assert (wrong_pixels < 1).float().mean() > 0.6  # the rest are z between two patterns
    assert nearest.bincount(minlength=4).min() > 20


def test_a_walk_changes_one_coordinate_from_minus_three_to_three_the_strongest_first() -> None:
    model = learner(Config(latent=3, hidden=8, init_std=0.5), ImageShape(1, 4, 4))
    with torch.no_grad():
        model.decoder.hidden.weight *= torch.tensor([1.0, 9.0, 3.0])
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.traverse(4, 5, rng())
    (z,) = seen
    z = z.view(4, 5, 3)
    for row, coordinate in enumerate([1, 2, 0, 1]):
        walk = z[row, :, coordinate]
        assert walk.tolist() == pytest.approx([-3, -1.5, 0, 1.5, 3])
        others = [i for i in range(3) if i != coordinate]
        assert (z[row, :, others] == z[row, :1, others]).all()
    assert not torch.equal(z[0, 0, [0, 2]], z[3, 0, [0, 2]])


def test_two_dimensions_are_mapped_whole() -> None:
    model = learner(Config(latent=2, hidden=8), ImageShape(1, 4, 4))
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.traverse(3, 5, rng())
    z = seen[0].view(3, 5, 2)
    assert z[:, 0, 0].tolist() == pytest.approx([-3, 0, 3], abs=0.01)
    assert z[0, [0, 2, 4], 1].tolist() == pytest.approx([-3, 0, 3], abs=0.01)
    assert (z[:, :, 0] == z[:, :1, 0]).all()
    assert (z[:, :, 1] == z[:1, :, 1]).all()


def test_a_collapsed_posterior_is_said() -> None:
    model = learner(Config(), ImageShape(1, 28, 28))
    (sentence,) = model.diagnose({"elbo": -206.0, "log_likelihood": -206.0, "kl": 0.01})
    assert "collapsed" in sentence
    assert model.diagnose({"elbo": -110.0, "log_likelihood": -85.0, "kl": 25.0}) == []
