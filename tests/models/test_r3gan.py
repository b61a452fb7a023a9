"""R3GAN against the paper, its released code's settings, and hand computation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.contract import Batch, ImageShape
from models.gan import augment
from models.gan.r3gan import R3GAN, Config, build, scheduled
from models.gan.r3gan_networks import Block, Doubled, Halved

SMALL = Config(latent=5, widths=(8, 8, 6), blocks=2, group_width=4, classes=3, burn_in=1000, mirror=False, augment=())
PLAIN = replace(SMALL, classes=0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learner(config: Config = SMALL, side: int = 16, channels: int = 3, seed: int = 0) -> R3GAN:
    torch.manual_seed(seed)
    return build(config, ImageShape(channels, side, side))


def some_batch(n: int = 6, images_seen: int = 0, side: int = 16) -> Batch:
    images = torch.randint(0, 256, (n, 3, side, side), generator=rng(11), dtype=torch.uint8)
    return Batch(images, torch.arange(n) % 3, images_seen)


def under_way(config: Config = SMALL) -> R3GAN:
    """One whose residual branches are no longer 0."""
    model = learner(config)
    with torch.no_grad():
        for network in model.networks().values():
            for block in blocks_of(network):
                nn.init.normal_(block.narrow.weight, 0, 0.3, generator=rng(3))
                nn.init.normal_(block.widen.bias, 0, 0.3, generator=rng(4))  # type: ignore[arg-type]
    return model


def blocks_of(network: nn.Module) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_of_the_cifar_10_networks_are_the_sum_over_their_layers() -> None:
    torch.manual_seed(0)
    networks = build(Config(), ImageShape(3, 32, 32)).networks()
    block = 768 * 1536 + 1536 + (1536 // 96) * 9 * 1536 + 1536 + 1536 * 768  # 96 groups
    assert [len(blocks_of(network)) for network in networks.values()] == [8, 8]
    assert count(networks["generator"]) == 8 * block + 10 * 64 + 128 * 768 + 16 * 768 + 768 * 3
    assert count(networks["discriminator"]) == 8 * block + 3 * 768 + 16 * 768 + 768 * 768 + 10 * 768


@pytest.mark.parametrize(("widths", "side"), [((4,), 4), ((8, 8), 8), ((8, 4, 4, 12), 32)])
@pytest.mark.parametrize("classes", [0, 2])
def test_shapes(widths: tuple[int, ...], side: int, classes: int) -> None:
    model = learner(replace(SMALL, widths=widths, classes=classes), side=side, channels=1)
    labels = F.one_hot(torch.tensor([0, 1, 1]), 2).float() if classes else None
    images = model.g(torch.randn(3, 5 + classes))
    assert images.shape == (3, 1, side, side)
    assert model.d(images, labels).shape == (3,)


def test_every_block_is_the_identity_at_the_start_and_the_networks_are_what_is_left() -> None:
    model = learner(PLAIN)
    for network in model.networks().values():
        for block in blocks_of(network):
            h = torch.randn(2, block.widen.in_channels, 4, 4, generator=rng(1))
            assert torch.equal(block(h), h)
    z = torch.randn(4, 5, generator=rng(2))
    maps = (z @ model.g.weigh.weight.T)[:, :, None, None] * model.g.basis
    doubled, change = Doubled(), next(m for m in model.g.upsample if isinstance(m, nn.Conv2d))
    by_hand = model.g.draw(doubled(change(doubled(maps))))  # 8 -> 8 needs no change of width, 8 -> 6 does
    torch.testing.assert_close(model.g(z), by_hand)


def test_weights_start_with_the_variance_that_the_depth_asks_for() -> None:
    torch.manual_seed(0)
    config = Config(latent=64, widths=(128, 128, 64), blocks=2, group_width=16, classes=10)
    networks = build(config, ImageShape(3, 16, 16)).networks()
    gain = math.sqrt(2 / 1.04) * 6 ** (-1 / 4)  # 6 blocks of 3 layers
    within = {"rel": 0.1}
    for network in networks.values():
        for block in blocks_of(network):
            width = block.widen.in_channels
            assert block.widen.weight.std().item() == pytest.approx(gain / math.sqrt(width), **within)
            assert block.mix.weight.std().item() == pytest.approx(gain / math.sqrt(16 * 9), **within)
            assert block.narrow.bias is None
            for layer in (block.widen, block.mix):
                assert layer.bias is not None and not layer.bias.any()
    g, d = learner(config).g, learner(config).d
    assert g.embed is not None and d.embed is not None
    assert g.basis.std().item() == pytest.approx(1, **within)
    assert g.weigh.weight.std().item() == pytest.approx(1 / math.sqrt(128), **within)
    assert g.embed.weight.std().item() == pytest.approx(1 / math.sqrt(10), **within)
    assert d.gather.weight.std().item() == pytest.approx(1 / 4, **within)
    assert d.judge.weight.std().item() == pytest.approx(1 / math.sqrt(128), **within)
    assert d.embed.weight.std().item() == pytest.approx(1 / math.sqrt(10 * 128), **within)


def test_a_block_is_the_formula() -> None:
    torch.manual_seed(0)
    block = Block(width=2, expansion=2, group=2, gain=1.0)
    nn.init.normal_(block.narrow.weight)
    nn.init.normal_(block.mix.bias)  # type: ignore[arg-type]
    h = torch.randn(1, 2, 3, 3)
    w1, w2, w3 = block.widen.weight[:, :, 0, 0], block.mix.weight, block.narrow.weight[:, :, 0, 0]

    def leaky(v: Tensor) -> Tensor:
        return torch.where(v > 0, v, 0.2 * v)

    inner = leaky(torch.einsum("oi,bihw->bohw", w1, h))
    around, mixed = F.pad(inner, (1, 1, 1, 1)), torch.zeros(1, 4, 3, 3)
    for o in range(4):
        first = o // 2 * 2  # each of both groups sees its own two channels
        for i in range(3):
            for j in range(3):
                mixed[0, o, i, j] = (around[0, first : first + 2, i : i + 3, j : j + 3] * w2[o]).sum() + block.mix.bias[
                    o
                ]  # type: ignore[index]
    torch.testing.assert_close(block(h), h + torch.einsum("oi,bihw->bohw", w3, leaky(mixed)))


def test_doubling_is_bilinear_between_zeros_and_halving_is_its_transpose() -> None:
    h = torch.randn(2, 3, 4, 4, generator=rng())
    surrounded = F.pad(h, (1, 1, 1, 1))
    bilinear = F.interpolate(surrounded, scale_factor=2, mode="bilinear", align_corners=False)[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(Doubled()(h), bilinear)
    x = torch.randn(2, 3, 8, 8, generator=rng(1))
    torch.testing.assert_close((Halved()(x) * h).sum(), (x * Doubled()(h)).sum() / 4)
    flat = Halved()(torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(flat[0, 0, 1:-1, 1:-1], torch.ones(2, 2))  # the filter keeps the mean


def test_an_image_is_judged_and_drawn_by_itself() -> None:
    """No normalisation: neighbours neither change an answer nor get a part of its gradient."""
    model = under_way()
    labels = F.one_hot(torch.tensor([0, 1, 2, 1]), 3).float()
    x = torch.randn(4, 3, 16, 16, generator=rng(), requires_grad=True)
    together = model.d(x, labels)
    for i in range(4):
        torch.testing.assert_close(model.d(x[i : i + 1], labels[i : i + 1])[0], together[i])
    (gradient,) = torch.autograd.grad(together[2], x)
    assert gradient[2].any() and not gradient[[0, 1, 3]].any()
    z = torch.cat([torch.randn(4, 5, generator=rng(1)), labels], dim=1)
    torch.testing.assert_close(model.g(z)[2:3], model.g(z[2:3]))


def test_the_class_is_a_factor_of_the_logit_and_a_part_of_the_latent() -> None:
    model = under_way()
    assert model.d.embed is not None and model.g.embed is not None
    x, labels = torch.randn(3, 3, 16, 16, generator=rng()), torch.eye(3)
    said = model.d.judge(model.d.gather(model.d.downsample(model.d.read(x))).flatten(1))
    torch.testing.assert_close(model.d(x, labels), torch.einsum("bm,mb->b", said, model.d.embed.weight))
    z = torch.randn(1, 5, generator=rng(1)).expand(3, 5)
    drawn = model.g(torch.cat([z, labels], dim=1))
    assert not torch.allclose(drawn[0], drawn[1])
    with torch.no_grad():
        model.g.embed.weight[:, 1] = model.g.embed.weight[:, 0]
    drawn = model.g(torch.cat([z, labels], dim=1))
    torch.testing.assert_close(drawn[0], drawn[1])


def test_the_step_is_the_update_of_d_and_then_of_g_written_out() -> None:
    """Penalties one image at a time by a graph of its own, losses as log sigmoid, Adam by its formula."""
    config = replace(SMALL, learning_rate=1e-2, last_learning_rate=1e-3, gamma=3.0, last_gamma=1.0)
    model, twin, batch = under_way(config), under_way(config), some_batch(n=4, images_seen=500)
    metrics = model.step(batch, rng(4))

    noise = rng(4)
    x, labels = batch.images / 127.5 - 1, F.one_hot(batch.labels, 3).float()

    def draw() -> Tensor:
        return twin.g(torch.cat([torch.randn(4, 5, generator=noise), labels], dim=1))  # type: ignore[no-any-return]

    fake = draw().detach()
    slopes: dict[str, list[Tensor]] = {"real": [], "fake": []}
    for kind, images in (("real", x), ("fake", fake)):
        for image, label in zip(images, labels, strict=True):
            at = image[None].clone().requires_grad_()
            (slope,) = torch.autograd.grad(twin.d(at, label[None])[0], at, create_graph=True)
            slopes[kind].append((slope**2).sum())
    r1, r2 = (torch.stack(slopes[kind]).mean() for kind in ("real", "fake"))
    gap = twin.d(x, labels) - twin.d(fake, labels)
    loss_d = -gap.sigmoid().log().mean()
    update(twin.d, loss_d + 2.0 / 2 * r1 + 2.0 / 2 * r2)  # half-way: gamma is 2
    loss_g = -(twin.d(draw(), labels) - twin.d(x, labels)).sigmoid().log().mean()
    update(twin.g, loss_g)

    expected = {"loss_d": loss_d, "loss_g": loss_g, "slope_real": r1, "slope_fake": r2, "gap": gap.mean()}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-4, atol=1e-6)
    assert metrics["in_order"].item() == pytest.approx((gap > 0).float().mean().item())
    assert metrics["gamma"].item() == pytest.approx(2)
    for name, network in twin.networks().items():
        for key, value in network.state_dict().items():
            torch.testing.assert_close(model.networks()[name].state_dict()[key], value, rtol=1e-3, atol=1e-5)


def update(network: nn.Module, loss: Tensor, rate: float = 5.5e-3) -> None:
    """Adam's first step, beta1 = 0: whatever beta2, the corrected mean of squares is the square of the gradient."""
    parameters = [*network.parameters()]
    with torch.no_grad():
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p -= rate * gradient / (gradient.abs() + 1e-8)


def test_the_generators_gradient_is_the_sigmoid_of_the_gap_times_the_slope_of_d() -> None:
    """d L_G / d G(z_i) = -sigmoid(D(x_i) - D(G(z_i))) grad D(G(z_i)) / B, whatever constant is added to D."""
    model, batch = under_way(PLAIN), some_batch(n=4)
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, __: Any, drawn: Tensor) -> None:
        if drawn.requires_grad:
            seen["fake"] = drawn.detach()
            drawn.register_hook(lambda gradient: seen.__setitem__("gradient", gradient))

    model.g.register_forward_hook(keep)
    model.step(batch, rng())
    x = batch.images / 127.5 - 1
    at = seen["fake"].requires_grad_()
    logits = model.d(at)  # after D's update, as in the step
    (slope,) = torch.autograd.grad(logits.sum(), at)
    weight = -(model.d(x) - logits).sigmoid() / 4
    torch.testing.assert_close(seen["gradient"], weight[:, None, None, None].detach() * slope)


def test_schedules_are_half_a_cosine_from_first_to_last() -> None:
    config = Config()
    first, last = scheduled(config, 0), scheduled(config, 20_000_000)
    assert (first.learning_rate, first.beta2, first.gamma, first.augment_probability) == pytest.approx(
        (2e-4, 0.9, 0.05, 0)
    )
    assert (last.learning_rate, last.beta2, last.gamma, last.augment_probability) == pytest.approx(
        (5e-5, 0.99, 0.005, 0.55)
    )
    assert scheduled(config, 200_000_000) == last
    middle, third = scheduled(config, 10_000_000), scheduled(config, 20_000_000 // 3)
    assert middle.gamma == pytest.approx(0.0275)
    assert middle.beta2 == pytest.approx(0.945)
    assert third.learning_rate == pytest.approx(5e-5 + 0.75 * 1.5e-4, rel=1e-6)  # cos(pi / 3) = 1/2
    assert third.augment_probability == pytest.approx(0.55 * 0.25, rel=1e-6)
    assert scheduled(replace(config, burn_in=0), 0) == last


def test_a_step_sets_what_the_schedule_says_whatever_came_before() -> None:
    model = learner()
    for seen in (0, 900, 300):
        model.step(some_batch(images_seen=seen), rng())
        now = scheduled(SMALL, seen)
        for optimizer in model.optimizers().values():
            (group,) = optimizer.param_groups
            assert (group["lr"], group["betas"]) == (now.learning_rate, (0.0, now.beta2))


def test_the_share_of_changed_images_is_the_schedules_and_both_kinds_are_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(SMALL, augment=("translation",), last_augment_probability=0.8)
    asked: list[tuple[Any, float]] = []

    def spy(x: Tensor, changes: Any, probability: float, generator: torch.Generator) -> Tensor:
        asked.append((changes, probability))
        return augment.augment(x, changes, probability, generator)

    monkeypatch.setattr("models.gan.r3gan.augment", spy)
    learner(config).step(some_batch(images_seen=500), rng())
    assert asked == [(("translation",), pytest.approx(0.4))] * 4


def test_penalties_are_of_the_image_before_its_change() -> None:
    """A square that is cut out of all of an image leaves D no slope there, so the penalty is smaller, not the same."""
    seen = []
    for changes in ((), ("cutout",)):
        config = replace(PLAIN, augment=changes, augment_probability=1.0)
        model = under_way(config)
        hidden: list[Tensor] = []
        model.d.read.register_forward_pre_hook(lambda _, inputs, kept=hidden: kept.append(inputs[0].detach()))
        metrics = model.step(some_batch(), rng())
        seen.append((metrics["slope_real"].item(), (hidden[0] == 0).float().mean().item()))
    assert seen[0][1] < 0.05 and seen[1][1] > 0.05
    assert 0 < seen[1][0] < seen[0][0]


def test_about_half_of_the_real_images_are_mirrored_and_nothing_else_is_done_to_them() -> None:
    model = learner(replace(SMALL, mirror=True))
    images = some_batch(400).images
    x, plain = model._real(images, rng()), images / 127.5 - 1
    flipped = (x == plain.flip(3)).flatten(1).all(1)
    assert ((x == plain).flatten(1).all(1) ^ flipped).all()
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(learner()._real(images, rng()), plain)


def test_samples_are_of_classes_drawn_evenly() -> None:
    model, generator = under_way(), rng(3)
    labels = F.one_hot(torch.randint(3, (128,), generator=generator), 3).float()
    z = torch.randn(128, 5, generator=generator)
    assert labels.sum(0).min() > 128 / 3 - 20
    drawn = model.g(torch.cat([z, labels], dim=1))
    expected = ((drawn + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert (model.sample(7, rng(3)).int() - expected[:7].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("gap", "in_order", "said"),
    [(1.0, 0.8, None), (-0.2, 0.4, "stopped learning"), (9.0, 0.995, "raise gamma")],
)
def test_diagnosis(gap: float, in_order: float, said: str | None) -> None:
    sentences = learner().diagnose({"gap": gap, "in_order": in_order})
    assert (said is None and sentences == []) or (said is not None and said in sentences[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (8, 8)}, "widths names 2 sides .* 16x16"),
        ({"widths": ()}, "widths names 0 sides"),
        ({"widths": (8, 8, 7)}, "14 channels inside a block are not whole groups of group_width 4"),
        ({"widths": (8, 0, 8)}, "widths has 0"),
        ({"classes": 1}, "classes is 1"),
        ({"augment": ("cutout", "cutout")}, "named once"),
        ({"last_gamma": -1.0}, "last_gamma is -1"),
        ({"burn_in": -5}, "burn_in is -5"),
        ({"beta2": 1.5}, "beta2 is 1.5"),
        ({"last_beta2": 1.0}, "last_beta2 is 1; it must be .* less than 1"),
        ({"last_learning_rate": -0.01}, "last_learning_rate is -0.01; it must be above 0"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"last_augment_probability": 2.0}, "last_augment_probability is 2"),
        ({"blocks": 0}, "blocks is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(replace(SMALL, **change))
