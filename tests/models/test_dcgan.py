"""DCGAN against the paper and against hand computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models.contract import Batch, ImageShape
from models.gan.dcgan import DCGAN, Config, build
from models.gan.losses import cross_entropy, non_saturating
from models.metrics.diversity import diversity_index, pixel_features
from models.metrics.sliced_wasserstein import Settings, distance

SMALL = Config(generator_width=4, discriminator_width=4)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learner(config: Config = SMALL, side: int = 16, channels: int = 3, seed: int = 0) -> DCGAN:
    torch.manual_seed(seed)
    return build(config, ImageShape(channels, side, side))


def some_batch(n: int = 8, side: int = 16, channels: int = 3) -> Batch:
    images = torch.randint(0, 256, (n, channels, side, side), generator=rng(11), dtype=torch.uint8)
    return Batch(images, torch.zeros(n, dtype=torch.int64), 0)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_losses_are_the_papers_cross_entropies() -> None:
    real, fake = torch.tensor([logit(0.9), logit(0.6)]), torch.tensor([logit(0.2), logit(0.3)])
    expected_d = -(math.log(0.9) + math.log(0.6)) / 2 - (math.log(0.8) + math.log(0.7)) / 2
    assert cross_entropy(real, fake).item() == pytest.approx(expected_d, rel=1e-6)
    assert non_saturating(fake).item() == pytest.approx(-(math.log(0.2) + math.log(0.3)) / 2, rel=1e-6)


def test_a_certain_discriminator_gives_a_finite_loss_and_the_generator_a_full_gradient() -> None:
    fake = torch.tensor([-200.0], requires_grad=True)
    loss = non_saturating(fake)
    assert loss.item() == pytest.approx(200)
    assert torch.autograd.grad(loss, fake)[0].item() == pytest.approx(-1)  # the non-saturating form: no vanishing


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_of_the_papers_64x64_networks() -> None:
    torch.manual_seed(0)
    networks = build(Config(), ImageShape(3, 64, 64)).networks()
    kernels = 25 * (1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3)
    assert count(networks["generator"]) == 100 * 16384 + kernels + 2 * (16384 + 512 + 256 + 128)
    assert count(networks["discriminator"]) == kernels + 2 * (256 + 512 + 1024) + 16384


def test_32x32_has_one_stage_less() -> None:
    torch.manual_seed(0)
    networks = build(Config(), ImageShape(3, 32, 32)).networks()
    kernels = 25 * (512 * 256 + 256 * 128 + 128 * 3)
    assert count(networks["generator"]) == 100 * 8192 + kernels + 2 * (8192 + 256 + 128)
    assert count(networks["discriminator"]) == kernels + 2 * (256 + 512) + 8192


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (4, 64)])
def test_shapes(channels: int, side: int) -> None:
    networks = learner(side=side, channels=channels).networks()
    images = networks["generator"](torch.rand(5, 100) * 2 - 1)
    assert images.shape == (5, channels, side, side)
    assert images.abs().max() <= 1
    assert networks["discriminator"](images).shape == (5,)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (4, 4), (32, 64), (48, 48)])
def test_a_side_that_doubling_does_not_reach_is_refused_by_name(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height}x{width}"):
        build(SMALL, ImageShape(3, height, width))


def test_weights_start_as_the_paper_says() -> None:
    torch.manual_seed(0)
    for network in build(Config(generator_width=32, discriminator_width=32), ImageShape(3, 32, 32)).networks().values():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                n = module.weight.numel()
                assert module.bias is None
                assert module.weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))
                assert module.weight.mean().item() == pytest.approx(0, abs=5 * 0.02 / math.sqrt(n))
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                n = module.weight.numel()
                assert module.weight.mean().item() == pytest.approx(1, abs=5 * 0.02 / math.sqrt(n))
                assert module.weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))
                assert module.bias.abs().max() == 0


def test_the_projection_is_normalised_output_by_output_not_channel_by_channel() -> None:
    g = learner().g
    z = torch.rand(16, 100, generator=rng()) * 2 - 1
    before = g.project_norm(g.project(z))
    with torch.no_grad():
        g.project.weight[3] *= 10  # one of the 16 places of channel 0
    after = g.project_norm(g.project(z))
    torch.testing.assert_close(after, before)
    spread = (before / g.project_norm.weight).detach()
    torch.testing.assert_close(spread.mean(0), torch.zeros(spread.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(spread.std(0, correction=0), torch.ones(spread.shape[1]), atol=1e-4, rtol=0)


def test_real_and_drawn_images_pass_the_discriminator_in_separate_batches_and_only_the_last_pass_reaches_g() -> None:
    model, batch = learner(), some_batch()
    passes: list[Tensor] = []
    model.d.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0]))
    model.step(batch, rng())
    assert [len(images) for images in passes] == [8, 8, 8]
    assert [images.requires_grad for images in passes] == [False, False, True]
    torch.testing.assert_close(passes[0], batch.images / 127.5 - 1)
    assert torch.equal(passes[1], passes[2])


def test_the_step_is_the_discriminators_update_and_then_the_generators() -> None:
    """The same update written out with plain autograd and Adam; nothing of G's loss may reach D."""
    model, twin, batch = learner(), learner(), some_batch()
    metrics = model.step(batch, rng(4))

    x = batch.images / 127.5 - 1
    z = torch.rand(8, 100, generator=rng(4)) * 2 - 1
    adam_d = torch.optim.Adam(twin.d.parameters(), lr=2e-4, betas=(0.5, 0.999), weight_decay=1e-5)
    adam_g = torch.optim.Adam(twin.g.parameters(), lr=2e-4, betas=(0.5, 0.999), weight_decay=1e-5)
    p_real, p_fake = twin.d(x).sigmoid(), twin.d(twin.g(z).detach()).sigmoid()
    loss_d = -p_real.log().mean() - (1 - p_fake).log().mean()
    for p, gradient in zip(twin.d.parameters(), torch.autograd.grad(loss_d, [*twin.d.parameters()]), strict=True):
        p.grad = gradient
    adam_d.step()
    loss_g = -twin.d(twin.g(z)).sigmoid().log().mean()
    for p, gradient in zip(twin.g.parameters(), torch.autograd.grad(loss_g, [*twin.g.parameters()]), strict=True):
        p.grad = gradient
    adam_g.step()

    expected = {"loss_d": loss_d, "loss_g": loss_g, "p_real": p_real.mean(), "p_fake": p_fake.mean()}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4)
    for mine, theirs in ((model.d, twin.d), (model.g, twin.g)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            # Adam's first step is lr * sign(gradient): only a gradient next to zero may fall on either side
            assert (a - b).abs().mean() < 2e-6


def test_the_discriminators_gradients_are_not_touched_by_the_generators_update() -> None:
    model = learner()
    kept: list[Tensor] = []
    model.optimizer_d.register_step_pre_hook(lambda *_: kept.extend(p.grad.clone() for p in model.d.parameters()))
    model.step(some_batch(), rng())
    assert all(torch.equal(a, p.grad) for a, p in zip(kept, model.d.parameters(), strict=True))
    assert all(p.requires_grad for p in model.d.parameters())


def test_l2_pulls_every_weight_towards_zero_when_nothing_else_does() -> None:
    """Adam's first step is lr * sign(gradient), and the gradient is 1e-5 times the weight."""
    model = learner()
    for network, optimizer in zip(model.networks().values(), model.optimizers().values(), strict=True):
        before = [p.detach().clone() for p in network.parameters()]
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, old in zip(network.parameters(), before, strict=True):
            large = old.abs() > 0.01  # smaller ones meet Adam's epsilon
            torch.testing.assert_close(p[large], (old - 2e-4 * old.sign())[large], atol=3e-5, rtol=0)


def test_latents_are_uniform_between_minus_one_and_one() -> None:
    model = learner()
    seen: list[Tensor] = []
    model.g.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.sample(512, rng())
    z = torch.cat(seen)
    assert z.shape == (512, 100)
    assert -1 <= z.min() < -0.99
    assert 0.99 < z.max() <= 1
    assert z.var().item() == pytest.approx(1 / 3, rel=0.02)


def test_the_published_generator_draws_what_the_generator_draws_in_a_large_batch() -> None:
    """Frozen statistics are those of 2,048 draws, so they err by one part in sqrt(2048) = 45; so does the image."""
    model = learner()
    module, _ = model.export(rng())
    z = torch.rand(4096, 100, generator=rng(7)) * 2 - 1
    with torch.no_grad():
        own, frozen = (model.g(z) + 1) / 2, module(z)
    assert (own - frozen).abs().mean() < 0.06 * own.std()


def test_frozen_statistics_are_the_mean_and_variance_over_latents() -> None:
    model = learner()
    module, _ = model.export(rng())
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm1d))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # z has mean 0 and variance 1/3 a coordinate: the variance of the projection is a third of its weights' square sum
    expected = model.g.project.weight.square().sum(1) / 3
    assert (norm.running_var / expected - 1).abs().mean() < 0.05
    assert (norm.running_mean / expected.sqrt()).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("p_real", "p_fake", "words"),
    [(0.99, 0.01, "certain"), (0.8, 0.75, "fools"), (0.5, 0.495, "no difference"), (0.45, 0.5, "no difference")],
)
def test_a_game_that_one_side_wins_is_said(p_real: float, p_fake: float, words: str) -> None:
    (sentence,) = learner().diagnose({"loss_d": 1.0, "loss_g": 1.0, "p_real": p_real, "p_fake": p_fake})
    assert words in sentence


@pytest.mark.parametrize(("p_real", "p_fake"), [(0.8, 0.2), (0.9, 0.08), (0.6, 0.4)])
def test_a_healthy_game_is_not_commented(p_real: float, p_fake: float) -> None:
    assert learner().diagnose({"p_real": p_real, "p_fake": p_fake}) == []


def test_a_d_that_is_to_say_less_than_one_is_certain_below_it() -> None:
    smoothed = build(Config(real_label=0.8), ImageShape(3, 8, 8))
    (sentence,) = smoothed.diagnose({"p_real": 0.79, "p_fake": 0.01})
    assert "certain" in sentence and learner().diagnose({"p_real": 0.79, "p_fake": 0.01}) == []


def test_two_patterns_are_learnt_and_both_are_drawn() -> None:
    """8x8 images, bright on the left or bright on top, slightly noisy: G must find both, in about equal shares."""
    noise = torch.randint(-20, 21, (256, 1, 8, 8), generator=rng(1))
    patterns = torch.full((2, 1, 8, 8), 40)
    patterns[0, :, :, :4] = 215
    patterns[1, :, :4, :] = 215
    data = (patterns[torch.arange(256) % 2] + noise).to(torch.uint8)
    torch.manual_seed(0)
    model = build(Config(latent=8, generator_width=16, discriminator_width=16, learning_rate=1e-3), ImageShape(1, 8, 8))
    generator, settings = rng(2), Settings(patch=5, smallest=8)
    start = distance(data, model.sample(256, rng(3)), settings)["swd"]
    for step in range(300):
        chosen = torch.randperm(256, generator=generator)[:32]
        model.step(Batch(data[chosen], torch.zeros(32, dtype=torch.int64), 32 * step), generator)
    drawn = model.sample(256, rng(3))
    end = distance(data, drawn, settings)["swd"]
    assert end < 0.3 * start
    assert 0.6 < diversity_index(pixel_features(drawn), pixel_features(data)) < 1.4
    nearest = torch.cdist(drawn.flatten(1).float(), patterns.flatten(1).float()).argmin(1)
    assert 0.2 < nearest.float().mean() < 0.8
