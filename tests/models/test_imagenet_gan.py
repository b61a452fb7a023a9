"""Improved GAN's ImageNet model against its released code's numbers, double loops and hand computation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.contract import Batch, ImageShape
from models.gan.imagenet import (
    Config,
    CrossBatchNorm,
    ImageNetGAN,
    build,
    kl_to_target,
    minibatch_features,
    real_logit,
)
from models.gan.virtual_batch_norm import EPS, VirtualBatchNorm

SMALL = Config(8, generator_width=8, discriminator_width=4, kernels=3, kernel_dimensions=2, classes=4, reference=3)
SHAPE = ImageShape(3, 32, 32)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learner(config: Config = SMALL, seed: int = 0) -> ImageNetGAN:
    torch.manual_seed(seed)
    return build(config, SHAPE)


def some_batch(n: int = 6) -> Batch:
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=rng(11), dtype=torch.uint8)
    return Batch(images, torch.arange(n) % 4, 0)


# --- virtual batch norm -----------------------------------------------------------------------------------------------


def made(channels: int) -> VirtualBatchNorm:
    norm = VirtualBatchNorm(channels)
    with torch.no_grad():
        norm.gamma.copy_(torch.rand(channels, generator=rng(1)) + 0.5)
        norm.beta.copy_(torch.randn(channels, generator=rng(2)))
    return norm


def test_virtual_batch_norm_by_a_double_loop() -> None:
    norm, x, r = made(2), torch.randn(3, 2, 4, 4, generator=rng(3)), 2 + torch.randn(5, 2, 4, 4, generator=rng(4))
    y, y_reference = norm(x, r)
    for c in range(2):
        mean, square = r[:, c].mean(), (r[:, c] ** 2).mean()
        for i in range(3):
            m = x[i, c].mean() / 6 + 5 * mean / 6
            s = (x[i, c] ** 2).mean() / 6 + 5 * square / 6
            expected = norm.gamma[c] * (x[i, c] - m) / torch.sqrt(s - m**2 + EPS) + norm.beta[c]
            torch.testing.assert_close(y[i, c], expected)
        expected = norm.gamma[c] * (r[:, c] - mean) / torch.sqrt(square - mean**2 + EPS) + norm.beta[c]
        torch.testing.assert_close(y_reference[:, c], expected)


def test_an_image_of_virtual_batch_norm_depends_on_no_neighbour() -> None:
    norm, x, r = made(2), torch.randn(3, 2, 4, 4, generator=rng(3)), torch.randn(5, 2, 4, 4, generator=rng(4))
    torch.testing.assert_close(norm(x[:1], r)[0], norm(x, r)[0][:1])


def test_virtual_batch_norm_with_a_large_reference_is_batch_norm_by_it() -> None:
    norm, r = made(2), torch.randn(3000, 2, 3, 3, generator=rng(4))
    y, _ = norm(r[:6], r)
    expected = F.batch_norm(r, None, None, norm.gamma, norm.beta, training=True, eps=EPS)[:6]
    torch.testing.assert_close(y, expected, atol=2e-3, rtol=0)


def test_a_constant_reference_is_not_divided_by_the_root_of_less_than_nothing() -> None:
    r = torch.full((4, 2, 3, 3), 1000.1)
    assert all(value.isfinite().all() for value in made(2)(r[:1], r))


# --- discriminator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 4, 3, 3), (6, 4)])
def test_each_half_of_the_channels_is_normalised_by_the_images_of_one_kind(size: tuple[int, ...]) -> None:
    norm, x = CrossBatchNorm(4), 3 + torch.randn(size, generator=rng(3))
    with torch.no_grad():
        norm.beta.copy_(torch.randn(4, generator=rng(2)))
    y = norm(x)
    for c in range(4):
        by = x[:3, c] if c < 2 else x[3:, c]
        expected = norm.gamma[c] * (x[:, c] - by.mean()) / torch.sqrt(by.var(correction=0) + 1e-5) + norm.beta[c]
        torch.testing.assert_close(y[:, c], expected)


def test_minibatch_features_by_a_triple_loop() -> None:
    m = torch.randn(6, 2, 3, generator=rng(5))
    got = minibatch_features(m)
    assert got.shape == (6, 4)
    for i in range(6):
        for half, images in enumerate((range(3), range(3, 6))):
            for a in range(2):
                others = [j for j in images if j != i]
                closeness = [math.exp(-float((m[i, a] - m[j, a]).abs().sum())) for j in others]
                assert got[i, 2 * half + a].item() == pytest.approx(sum(closeness) / len(others), rel=1e-5)


def test_images_that_are_all_alike_are_told_by_their_minibatch_features() -> None:
    alike = minibatch_features(torch.cat([100 * torch.randn(3, 2, 5, generator=rng(1)), torch.ones(3, 2, 5)]))
    torch.testing.assert_close(alike[3:, 2:], torch.ones(3, 2))
    assert alike[:3].max() < 1e-3


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_logit_of_real_weighs_all_classes_against_the_last() -> None:
    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert real_logit(logits).sigmoid().item() == pytest.approx(6 / 10)


@pytest.mark.parametrize("target", [0.0, 0.375, 0.75])
@pytest.mark.parametrize("p", [0.1, 0.375, 0.75])
def test_the_divergence_from_the_target_is_zero_there_and_the_written_sum_elsewhere(target: float, p: float) -> None:
    expected = sum(t * math.log(t / q) for t, q in ((target, p), (1 - target, 1 - p)) if t > 0)
    got = kl_to_target(target, torch.tensor([math.log(p / (1 - p))]))
    assert got.item() == pytest.approx(expected, abs=1e-6)


# --- networks and step ------------------------------------------------------------------------------------------------


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_sizes_of_the_released_codes_networks() -> None:
    with torch.device("meta"):
        model = build(Config(), ImageShape(3, 128, 128))
    assert model.g.noise == [(64, 4, 4), (64, 8, 8), (32, 16, 16), (16, 32, 32), (8, 64, 64), (8, 128, 128)]
    assert model.g.reference.shape == (16, 201_728)
    ups = 25 * (576 * 256 + 320 * 128 + 160 * 64 + 80 * 64 + 72 * 64)
    norms = 2 * (512 + 256 + 128 + 3 * 64)
    assert count(model.g) == 8192 * 8192 + ups + norms + 25 * 72 * 3 + 3
    convs = 9 * (3 * 64 + 64 * 128 + 128 * 256 + 2 * 256 * 256 + 256 * 512 + 512 * 512)
    norms = 2 * (64 + 128 + 3 * 256 + 2 * 512 + 2560)
    assert count(model.d) == convs + norms + 8192 * 2560 + 2560 * 15_000 + (2560 + 600) * 1001 + 1001


def test_weights_start_as_the_released_code_says() -> None:
    torch.manual_seed(0)
    model = build(replace(SMALL, latent=300, generator_width=16, discriminator_width=16), SHAPE)
    for module in (model.g.project, model.g.up[0], model.d.compare, model.d.classify):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)  # type: ignore[union-attr, operator]
    assert model.g.draw.weight.std().item() == pytest.approx(0.075, rel=0.1)
    assert model.g.draw.bias.tolist() == pytest.approx([-0.45] * 3)  # type: ignore[union-attr]
    convs = [m.weight for m in model.d.tower if isinstance(m, nn.Conv2d)]
    assert len(convs) == 7 and all(w.abs().max() <= 0.04 for w in convs)
    assert convs[-1].std().item() == pytest.approx(0.02 * 0.8796, rel=0.05)  # a normal cut at two deviations
    assert -1 <= model.g.reference.min() < -0.99 and 0.99 < model.g.reference.max() <= 1


@pytest.mark.parametrize("side", [32, 64, 128])
def test_images_have_the_side_asked_for_and_depend_on_all_their_numbers(side: int) -> None:
    torch.manual_seed(0)
    model = build(SMALL, ImageShape(3, side, side))
    z = (torch.rand(2, sum(model.g.sizes), generator=rng(1)) * 2 - 1).requires_grad_()
    images = model.g(z)
    assert images.shape == (2, 3, side, side) and images.abs().max() < 1
    assert model.d(torch.cat([images, images])).shape == (4, 5)
    images[0].sum().backward()
    assert z.grad is not None
    assert (z.grad[0] != 0).float().mean() > 0.95 and (z.grad[1] == 0).all()


@pytest.mark.parametrize(("height", "width"), [(28, 28), (16, 16), (32, 64), (256, 256)])
def test_another_side_is_refused_by_name(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height}x{width}"):
        build(SMALL, ImageShape(3, height, width))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(SMALL, discriminator_width=3), "discriminator_width is 3"),
        (replace(SMALL, smoothing=1.0), "smoothing is 1"),
        (replace(SMALL, reference=0), "reference is 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(config: Config, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(config, SHAPE)


def test_both_updates_are_of_the_weights_before_the_step() -> None:
    model, twin, batch = learner(), learner(), some_batch()
    metrics = model.step(batch, rng(4))

    generator = rng(4)
    x = batch.images / 127.5 - 1
    fake = twin.g(torch.rand(6, sum(twin.g.sizes), generator=generator) * 2 - 1)
    joint = torch.cat([x, fake])
    logits = twin.d(joint + 0.1 * torch.randn(joint.shape, generator=generator))
    p = 1 - torch.softmax(logits, 1)[:, -1]
    p_real, p_fake = p[:6], p[6:]
    loss_class = -torch.softmax(logits[:6], 1)[range(6), batch.labels].log().mean()
    loss_d = _kl(0.75, p_real) - (1 - p_fake).log().mean() + loss_class
    loss_g = _kl(0.375, p_fake)
    expected = {"loss_d": loss_d, "loss_class": loss_class, "loss_g": loss_g}
    expected |= {"p_real": p_real.mean(), "p_fake": p_fake.mean()}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    for network, loss in ((twin.d, loss_d), (twin.g, loss_g)):
        gradients = torch.autograd.grad(loss, [*network.parameters()], retain_graph=True)
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
    for mine, theirs in ((model.d, twin.d), (model.g, twin.g)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def _kl(target: float, p: Tensor) -> Tensor:
    return (target * (target / p).log() + (1 - target) * ((1 - target) / (1 - p)).log()).mean()


@pytest.mark.parametrize(
    ("p_real", "p_fake", "words"), [(0.75, 0.01, "knows"), (0.8, 0.7, "fools"), (0.4, 0.39, "no difference")]
)
def test_a_game_that_one_side_wins_is_said(p_real: float, p_fake: float, words: str) -> None:
    (sentence,) = learner().diagnose({"p_real": p_real, "p_fake": p_fake})
    assert words in sentence
    assert learner().diagnose({"p_real": 0.6, "p_fake": 0.2}) == []
