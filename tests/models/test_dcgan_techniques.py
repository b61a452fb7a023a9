"""DCGAN's techniques in a step of its own: each against its equation, written out with plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from models.contract import Batch, ImageShape
from models.gan.augment import augment
from models.gan.dcgan import DCGAN, Config, build
from models.gan.dcgan_networks import DiscriminatorNetwork
from models.gan.virtual_batch_norm import EPS
from models.gan.weight_norm import WeightNorm

IMAGES, SIDE = 8, 16


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def learner(steep: float = 8.0, **settings: Any) -> DCGAN:
    """Small, and with a D steep enough for its logits to lie anywhere between -3 and 3."""
    torch.manual_seed(0)
    model = build(Config(latent=6, generator_width=4, discriminator_width=4, **settings), ImageShape(2, SIDE, SIDE))
    with torch.no_grad():
        for parameter in model.d.parameters():
            if parameter.dim() > 1:
                parameter.mul_(steep)
    return model


def some_batch(n: int = IMAGES, seed: int = 11) -> Batch:
    images = torch.randint(0, 256, (n, 2, SIDE, SIDE), generator=rng(seed), dtype=torch.uint8)
    return Batch(images, torch.arange(n) % 3, 0)


def scaled(batch: Batch) -> Tensor:
    return batch.images / 127.5 - 1


def latents(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, 6, generator=generator) * 2 - 1


def gradients_of(model: DCGAN, batch: Batch, generator: Generator) -> dict[str, list[list[Tensor]]]:
    """Of one step: by network, those of each of its updates."""
    seen: dict[str, list[list[Tensor]]] = {"generator": [], "discriminator": []}
    for name, optimizer in model.optimizers().items():
        parameters = [*model.networks()[name].parameters()]
        optimizer.register_step_pre_hook(
            lambda *_, name=name, parameters=parameters: seen[name].append([p.grad.clone() for p in parameters])
        )
    model.step(batch, generator)
    return seen


def assert_close(got: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    """Each to a thousandth of its own size."""
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-7, (a.shape, a.norm(), b.norm())
    assert any(b.norm() > 1e-4 for b in expected)


# --- losses, penalties, changes of images: what D and G minimise


Loss = Callable[[DiscriminatorNetwork, Tensor, Tensor, Generator], Tensor]
"""(D, x, G(z), randomness after z) -> the loss of D, or of G."""


class Step(NamedTuple):
    settings: dict[str, Any]
    of_d: Loss
    of_g: Loss


def game_d(d: DiscriminatorNetwork, x: Tensor, fake: Tensor, _: Generator) -> Tensor:
    return -d(x).sigmoid().log().mean() - (1 - d(fake).sigmoid()).log().mean()


def game_g(d: DiscriminatorNetwork, x: Tensor, fake: Tensor, _: Generator) -> Tensor:
    return -d(fake).sigmoid().log().mean()


def slopes(d: DiscriminatorNetwork, images: Tensor) -> Tensor:
    """| grad D | of one image after the other."""
    found = []
    for image in images.split(1):
        at = image.detach().requires_grad_()
        found.append(torch.autograd.grad(d(at).sum(), at, create_graph=True)[0].square().sum().sqrt())
    return torch.stack(found)


def between(x: Tensor, fake: Tensor, generator: Generator) -> Tensor:
    e = torch.rand(len(x), 1, 1, 1, generator=generator)
    return e * x + (1 - e) * fake


def moved(x: Tensor, generator: Generator) -> Tensor:
    return augment(x, ("translation", "cutout"), 0.7, generator)


def moved_r1(d: DiscriminatorNetwork, x: Tensor, fake: Tensor, generator: Generator) -> Tensor:
    """The slope is taken at the image that is not changed."""
    at = x.clone().requires_grad_()
    real, drawn = d(moved(at, generator)), d(moved(fake, generator))
    (slope,) = torch.autograd.grad(real.sum(), at, create_graph=True)
    return (
        -real.sigmoid().log().mean() - (1 - drawn.sigmoid()).log().mean() + 3 / 2 * slope.square().sum((1, 2, 3)).mean()
    )


def seen(d: DiscriminatorNetwork, x: Tensor) -> Tensor:
    """(f, o) by a double loop over images."""
    assert d.compare is not None
    f = d.features(x)
    m = (f @ d.compare.t.weight.T).unflatten(1, (3, 2))
    o = [sum(torch.exp(-(m[i] - m[j]).abs().sum(1)) for j in range(len(m)) if j != i) for i in range(len(m))]
    return torch.cat([f, torch.stack(o)], dim=1)  # type: ignore[arg-type]


def crowded_d(d: DiscriminatorNetwork, x: Tensor, fake: Tensor, _: Generator) -> Tensor:
    real, drawn = (seen(d, images) @ d.classify.weight[0] for images in (x, fake))  # type: ignore[index, operator]
    return -real.sigmoid().log().mean() - (1 - drawn.sigmoid()).log().mean()


# fmt: off
STEPS: dict[str, Step] = {
    "saturating": Step({"loss": "saturating"}, game_d, lambda d, x, fake, _: (1 - d(fake).sigmoid()).log().mean()),
    "hinge": Step({"loss": "hinge"}, lambda d, x, fake, _: (1 - d(x)).clamp_min(0).mean() + (1 + d(fake)).clamp_min(0).mean(), lambda d, x, fake, _: -d(fake).mean()),  # noqa: E501
    "wasserstein": Step({"loss": "wasserstein", "penalty": "wgan-gp", "penalty_weight": 5.0, "discriminator_norm": "none"}, lambda d, x, fake, g: d(fake).mean() - d(x).mean() + 5 * (slopes(d, between(x, fake, g)) - 1).square().mean(), lambda d, x, fake, _: -d(fake).mean()),  # noqa: E501
    "relativistic": Step({"loss": "relativistic"}, lambda d, x, fake, _: -(d(x) - d(fake)).sigmoid().log().mean(), lambda d, x, fake, _: -(d(fake) - d(x)).sigmoid().log().mean()),  # noqa: E501
    "r1": Step({"penalty": "r1", "penalty_weight": 3.0, "discriminator_norm": "none"}, lambda d, x, fake, g: game_d(d, x, fake, g) + 3 / 2 * slopes(d, x).square().mean(), game_g),  # noqa: E501
    "r2": Step({"penalty": "r2", "penalty_weight": 3.0, "discriminator_norm": "none"}, lambda d, x, fake, g: game_d(d, x, fake, g) + 3 / 2 * slopes(d, fake).square().mean(), game_g),  # noqa: E501
    "relativistic r1+r2": Step({"loss": "relativistic", "penalty": "r1+r2", "penalty_weight": 2.0, "discriminator_norm": "none"}, lambda d, x, fake, _: -(d(x) - d(fake)).sigmoid().log().mean() + slopes(d, x).square().mean() + slopes(d, fake).square().mean(), lambda d, x, fake, _: -(d(fake) - d(x)).sigmoid().log().mean()),  # noqa: E501
    "smoothing": Step({"real_label": 0.8}, lambda d, x, fake, _: -(0.8 * d(x).sigmoid().log() + 0.2 * (1 - d(x).sigmoid()).log()).mean() - (1 - d(fake).sigmoid()).log().mean(), game_g),  # noqa: E501
    "feature matching": Step({"feature_matching": True}, game_d, lambda d, x, fake, _: (d.features(x).mean(0) - d.features(fake).mean(0)).square().sum()),  # noqa: E501
    "minibatch features": Step({"minibatch_kernels": 3, "minibatch_dimensions": 2}, crowded_d, lambda d, x, fake, _: -(seen(d, fake) @ d.classify.weight[0]).sigmoid().log().mean()),  # type: ignore[index, operator]  # noqa: E501
    "minibatch features matched": Step({"feature_matching": True, "minibatch_kernels": 3, "minibatch_dimensions": 2}, crowded_d, lambda d, x, fake, _: (seen(d, x).mean(0) - seen(d, fake).mean(0)).square().sum()),  # noqa: E501
    "augmentation": Step({"augment": ("translation", "cutout"), "augment_probability": 0.7}, lambda d, x, fake, g: game_d(d, moved(x, g), moved(fake, g), g), lambda d, x, fake, g: game_g(d, x, moved(fake, g), g)),  # noqa: E501
    "augmented r1": Step({"augment": ("translation", "cutout"), "augment_probability": 0.7, "penalty": "r1", "penalty_weight": 3.0, "discriminator_norm": "none"}, moved_r1, lambda d, x, fake, g: game_g(d, x, moved(fake, g), g)),  # noqa: E501
    "augmented relativistic": Step({"loss": "relativistic", "augment": ("translation", "cutout"), "augment_probability": 0.7}, lambda d, x, fake, g: -(d(moved(x, g)) - d(moved(fake, g))).sigmoid().log().mean(), lambda d, x, fake, g: -(d(moved(fake, g)) - d(moved(x, g))).sigmoid().log().mean()),  # noqa: E501
    "augmented features": Step({"augment": ("translation", "cutout"), "augment_probability": 0.7, "feature_matching": True}, lambda d, x, fake, g: game_d(d, moved(x, g), moved(fake, g), g), lambda d, x, fake, g: (d.features(moved(x, g)).mean(0) - d.features(moved(fake, g)).mean(0)).square().sum()),  # noqa: E501
}
# fmt: on


@pytest.mark.parametrize("name", STEPS)
def test_both_networks_follow_the_gradient_of_their_loss(name: str) -> None:
    settings, of_d, of_g = STEPS[name]
    model, batch = learner(**settings), some_batch()
    twin, generator, x = copy.deepcopy(model), rng(4), scaled(batch)
    got = gradients_of(model, batch, rng(4))
    fake = twin.g(latents(IMAGES, generator))
    expected = torch.autograd.grad(of_d(twin.d, x, fake.detach(), generator), [*twin.d.parameters()])
    assert_close(got["discriminator"][0], expected)
    twin.d.load_state_dict(model.d.state_dict())  # G answers to the D that was just updated
    assert_close(got["generator"][0], torch.autograd.grad(of_g(twin.d, x, fake, generator), [*twin.g.parameters()]))
    assert [len(updates) for updates in got.values()] == [1, 1]


def test_what_is_logged_of_a_game_without_probabilities() -> None:
    model, batch = learner(loss="hinge", penalty="r1", penalty_weight=3.0, discriminator_norm="none"), some_batch()
    twin = copy.deepcopy(model)
    metrics = model.step(batch, rng(4))
    x, fake = scaled(batch), twin.g(latents(IMAGES, rng(4)))
    assert metrics.keys() == {"loss_d", "loss_g", "gap", "penalty"}
    torch.testing.assert_close(metrics["gap"], twin.d(x).mean() - twin.d(fake).mean())
    torch.testing.assert_close(metrics["penalty"], 1.5 * slopes(twin.d, x).square().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["loss_d"], F.relu(1 - twin.d(x)).mean() + F.relu(1 + twin.d(fake)).mean())
    assert model.diagnose({"gap": 0.5}) == []
    (sentence,) = model.diagnose({"gap": -0.5})
    assert "by 0.5" in sentence


def test_a_compiled_d_is_asked_for_its_slope_uncompiled() -> None:
    """A compiled graph has no second derivative: torch refuses it in the backward pass."""
    model = learner(penalty="r1+r2", discriminator_norm="none")
    model.d.compile(backend="aot_eager")
    twin = learner(penalty="r1+r2", discriminator_norm="none")
    for each in (model, twin):
        each.step(some_batch(), rng())
    for a, b in zip(model.d.parameters(), twin.d.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# --- historical averaging


def test_history_pulls_either_network_to_the_mean_of_its_weights() -> None:
    """In the second step the mean is that of two, and the gradient of w | theta - mean |^2 is w (theta_2 - theta_1)."""
    with_history, without = learner(historical_weight=0.7), learner()
    with_history.step(some_batch(), rng(1))
    without.step(some_batch(), rng(1))
    starts = learner()
    pulls = {
        name: [0.7 * (after - before) for before, after in zip(first.parameters(), now.parameters(), strict=True)]
        for name, first, now in (("generator", starts.g, without.g), ("discriminator", starts.d, without.d))
    }
    for a, b in zip(with_history.d.parameters(), without.d.parameters(), strict=True):
        assert torch.equal(a, b)  # the first mean is where the weights are
    got = gradients_of(with_history, some_batch(seed=12), rng(2))["discriminator"][0]
    plain = gradients_of(without, some_batch(seed=12), rng(2))["discriminator"][0]
    for a, b, pull in zip(got, plain, pulls["discriminator"], strict=True):
        torch.testing.assert_close(a - b, pull.detach(), atol=1e-5, rtol=0)  # they are of the size of a step, 1.4e-4

    again = learner(historical_weight=0.7)
    again.step(some_batch(), rng(1))
    still = copy.deepcopy(again)
    still.config = Config(latent=6, historical_weight=0.0)
    for model in (again, still):  # D must be the same one when G answers to it
        model.optimizer_d.param_groups[0]["lr"] = 0.0
    got, plain = (gradients_of(model, some_batch(seed=12), rng(2))["generator"][0] for model in (again, still))
    for a, b, pull in zip(got, plain, pulls["generator"], strict=True):
        torch.testing.assert_close(a - b, pull.detach(), atol=1e-5, rtol=0)


# --- two time scales


def test_two_learning_rates_are_the_sizes_of_the_first_steps() -> None:
    model = learner(learning_rate=1e-4, discriminator_learning_rate=4e-4)
    before = copy.deepcopy(model)
    model.step(some_batch(), rng())
    for now, then, size in ((model.g, before.g, 1e-4), (model.d, before.d, 4e-4)):
        largest = max((a - b).abs().max().item() for a, b in zip(now.parameters(), then.parameters(), strict=True))
        assert largest == pytest.approx(size, rel=0.01)


def test_each_update_of_d_sees_images_of_its_own_and_g_answers_for_the_last() -> None:
    model, batch = learner(discriminator_steps=4, classes=3), some_batch(12)
    passes: list[tuple[Tensor, Tensor]] = []
    model.d.register_forward_pre_hook(lambda _, inputs: passes.append(inputs))
    latents_seen: list[Tensor] = []
    model.g.register_forward_pre_hook(lambda _, inputs: latents_seen.append(inputs[0]))
    got = gradients_of(model, batch, rng())
    assert [len(updates) for updates in got.values()] == [1, 4]
    real, drawn = passes[0:8:2], passes[1:8:2]
    torch.testing.assert_close(torch.cat([x for x, _ in real]), scaled(batch))
    for pairs in (real, drawn):
        assert torch.equal(torch.cat([labels for _, labels in pairs]), F.one_hot(batch.labels, 3).float())
    assert len(passes) == 9 and torch.equal(passes[8][0], drawn[3][0]) and torch.equal(passes[8][1], drawn[3][1])
    assert [z.shape for z in latents_seen] == [(3, 9)] * 4
    assert not torch.equal(latents_seen[0][:, :6], latents_seen[1][:, :6])
    assert torch.equal(torch.cat([z[:, 6:] for z in latents_seen]), F.one_hot(batch.labels, 3).float())


def test_a_share_that_the_updates_of_d_cannot_divide_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"8 image.*discriminator_steps 3"):
        learner(discriminator_steps=3).step(some_batch(), rng())


# --- classes


def test_the_logit_of_an_image_of_a_class_has_that_classes_vector_in_it() -> None:
    model, x = learner(classes=3), scaled(some_batch())
    assert model.d.embed is not None
    f, y = model.d.features(x), torch.tensor([2, 0, 1, 1, 0, 2, 2, 0])
    expected = [f[i] @ (model.d.classify.weight[0] + model.d.embed.weight[:, y[i]]) for i in range(8)]  # type: ignore[index, operator]
    torch.testing.assert_close(model.d(x, F.one_hot(y, 3).float()), torch.stack(expected))
    assert model.needs().classes == 3 and learner().needs().classes == 0


def test_samples_are_of_classes_drawn_evenly_also_of_more_than_are_decoded_together() -> None:
    model, given = learner(classes=300), []
    model.g.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.sample(3_000, rng())
    z, labels = torch.cat(given).split([6, 300], dim=1)
    counts = labels.sum(0)
    assert (labels.sum(1) == 1).all() and z.min() < 0 < z.max()
    chi_square = float((counts - len(z) / 300).square().sum() / (len(z) / 300))
    assert abs(chi_square - 299) < 5 * (2 * 299) ** 0.5 and float(counts[:128].sum() / len(z)) < 0.5


def test_the_gradient_penalty_is_of_ds_answer_for_the_images_own_class_and_through_the_changes() -> None:
    changes: dict[str, Any] = {"augment": ("translation", "cutout"), "augment_probability": 0.7}
    model, batch = learner(penalty="wgan-gp", discriminator_norm="none", classes=3, **changes), some_batch()
    batch = replace(batch, labels=torch.arange(IMAGES) % 3)
    d, x, labels = copy.deepcopy(model.d), scaled(batch), F.one_hot(batch.labels, 3).float()
    generator = rng(4)
    fake = model.g(torch.cat([latents(IMAGES, generator), labels], dim=1)).detach()
    moved(x, generator), moved(fake, generator)
    at = between(x, fake, generator).requires_grad_()
    (slope,) = torch.autograd.grad(d(moved(at, generator), labels).sum(), at)
    expected = 10 * (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
    torch.testing.assert_close(model.step(batch, rng(4))["penalty"], expected)


@pytest.mark.parametrize("penalty", ["r1+r2", "wgan-gp"])
def test_penalties_work_under_bf16(penalty: str) -> None:
    model = learner(penalty=penalty, discriminator_norm="none")
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        metrics = model.step(some_batch(), rng())
    assert metrics["penalty"].isfinite() and metrics["penalty"].dtype == torch.float32


# --- norms


def test_virtual_batch_norm_of_the_reference_is_batch_norm() -> None:
    """Where the reference is the batch: each network's pass of it, with the same weights."""
    virtual = learner(discriminator_norm="virtual", generator_norm="virtual", virtual_reference=IMAGES)
    plain = learner()
    for norm in [*plain.d.modules(), *plain.g.modules()]:
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.eps = EPS
    for mine, theirs in ((virtual.d, plain.d), (virtual.g, plain.g)):
        parameters = [*theirs.parameters()]
        with torch.no_grad():
            for a, b in zip(mine.parameters(), parameters, strict=True):
                b.copy_(a.view_as(b))
    x, z = scaled(some_batch()), latents(IMAGES, rng(1))
    virtual.initialise(some_batch(), rng())
    reached: list[Tensor] = []
    virtual.d.features.register_forward_hook(lambda *given: reached.append(given[2]))
    virtual.g.upsample.register_forward_hook(lambda *given: reached.append(given[2]))
    virtual.d(torch.zeros(5, 2, SIDE, SIDE))
    assert virtual.g.reference is not None
    virtual.g.reference.copy_(z)
    virtual.g(torch.ones(5, 6))
    torch.testing.assert_close(reached[0][5:], plain.d.features(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reached[1][5:], plain.g(z), rtol=1e-4, atol=1e-4)


def test_an_image_beside_a_reference_does_not_depend_on_its_neighbours() -> None:
    model = learner(discriminator_norm="virtual", generator_norm="virtual", virtual_reference=3)
    model.initialise(some_batch(), rng())
    assert model.d.reference is not None
    torch.testing.assert_close(model.d.reference, scaled(some_batch())[:3])
    x, z = scaled(some_batch(seed=5)), latents(4, rng(3))
    torch.testing.assert_close(model.d(x)[:1], model.d(x[:1]))
    torch.testing.assert_close(model.g(z)[:1], model.g(z[:1]))
    assert not torch.allclose(learner().d(x)[:1], learner().d(x[:4])[:1])


def test_gs_reference_is_of_all_latents_and_of_the_classes_in_turn() -> None:
    reference = learner(generator_norm="virtual", virtual_reference=300, classes=3).g.reference
    assert reference is not None
    z, labels = reference.split([6, 3], dim=1)
    assert -1 <= z.min() < -0.99 and 0.99 < z.max() <= 1
    assert torch.equal(labels, F.one_hot(torch.arange(300) % 3, 3).float())


def test_a_share_smaller_than_the_reference_is_refused_with_both_numbers() -> None:
    model = learner(discriminator_norm="virtual", virtual_reference=9)
    with pytest.raises(ValueError, match=r"8 image.*virtual_reference of 9"):
        model.initialise(some_batch(), rng())


def test_every_weight_of_a_spectral_d_has_a_largest_singular_value_of_one() -> None:
    model, x = learner(steep=1, discriminator_norm="spectral", classes=3), scaled(some_batch(2))
    labels = F.one_hot(torch.tensor([0, 1]), 3).float()
    for _ in range(300):
        model.d(x, labels)
    layers = [m for m in model.d.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    largest = [torch.linalg.svdvals(layer.weight.flatten(1))[0].item() for layer in layers]
    assert largest == pytest.approx([1.0] * 4, rel=1e-3)  # two convolutions, w, e
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.d.modules())


@pytest.mark.parametrize(("learnt", "parameters"), [("all", 3), ("last", 1), ("none", 0)])
def test_first_images_give_every_weight_normalised_layer_mean_zero_and_deviation_one(
    learnt: str, parameters: int
) -> None:
    model = learner(steep=1, discriminator_norm="weight", learnt_gains=learnt, minibatch_kernels=3)
    model.initialise(some_batch(), rng())
    outputs: list[Tensor] = []
    layers = [m for m in model.d.modules() if isinstance(m, WeightNorm)]
    for layer in layers:
        layer.register_forward_hook(lambda *given: outputs.append(given[2]))
    model.d(scaled(some_batch()))
    assert len(outputs) == 3
    for y in outputs:
        by_unit = y.transpose(0, 1).flatten(1)
        torch.testing.assert_close(by_unit.mean(1), torch.zeros(len(by_unit)), atol=1e-4, rtol=0)
        torch.testing.assert_close(by_unit.std(1, correction=0), torch.ones(len(by_unit)), atol=1e-3, rtol=0)
    gains = [isinstance(layer.gain, nn.Parameter) for layer in layers]
    assert sum(gains) == parameters and (gains[-1] or not parameters)
