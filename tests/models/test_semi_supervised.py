"""The semi-supervised GAN against the paper, its released code's numbers, and hand computation."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.contract import UNKNOWN, Batch, ImageShape, Labelled
from models.gan.semi_supervised import (
    ADAM_EPS,
    PIXELS,
    Config,
    SemiSupervisedGAN,
    build,
    feature_matching_loss,
    labelled_loss,
    step_size,
    unlabelled_loss,
)

DENSE = Config(classes=3, latent=6, width=0.05)
CONVOLUTIONAL = Config("cifar10", classes=3, latent=6, width=0.04, learning_rate=3e-4)
SHAPES = {DENSE: ImageShape(1, 8, 8), CONVOLUTIONAL: ImageShape(3, 16, 16)}

both = pytest.mark.parametrize("config", [DENSE, CONVOLUTIONAL], ids=["dense", "convolutional"])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learner(config: Config, seed: int = 0) -> SemiSupervisedGAN:
    torch.manual_seed(seed)
    return build(config, SHAPES[config])


def some_images(config: Config, n: int, seed: int = 1) -> Tensor:
    s = SHAPES[config]
    return torch.randint(0, 256, (n, s.channels, s.height, s.width), generator=rng(seed), dtype=torch.uint8)


def some_batch(config: Config, n: int = 12, seed: int = 1) -> Batch:
    few = Labelled(some_images(config, 6, seed + 100), torch.tensor([0, 1, 2, 0, 1, 2]))
    return Batch(some_images(config, n, seed), torch.full((n,), UNKNOWN), 0, labelled=few)


def state(model: SemiSupervisedGAN) -> dict[str, Tensor]:
    return {f"{n}.{k}": v.clone() for n, net in model.networks().items() for k, v in net.state_dict().items()}


def with_zero(logits: Tensor) -> Tensor:
    """The K + 1 logits, the last of which is 0."""
    return torch.cat([logits, torch.zeros(len(logits), 1)], dim=1)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    """exp l = (1, 3): Z = log 4 and D(x) = 4/5; exp l = (1/2, 1/2): Z = 0 and D = 1/2."""
    real, fake = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[-math.log(2), -math.log(2)]])
    assert labelled_loss(real, torch.tensor([1])).item() == pytest.approx(-math.log(3 / 4))
    assert labelled_loss(real, torch.tensor([0])).item() == pytest.approx(-math.log(1 / 4))
    expected = 0.5 * (-math.log(4 / 5) - math.log(1 - 1 / 2))
    assert unlabelled_loss(real, fake).item() == pytest.approx(expected, rel=1e-6)


def test_losses_are_the_cross_entropies_of_k_plus_one_classes_with_a_logit_of_zero() -> None:
    real, fake = 3 * torch.randn(7, 5, generator=rng(1)), 3 * torch.randn(4, 5, generator=rng(2))
    drawn = torch.full((4,), 5)
    p_real = torch.softmax(with_zero(real), 1)[:, :5].sum(1)
    expected = 0.5 * (-p_real.log().mean() + F.cross_entropy(with_zero(fake), drawn))
    torch.testing.assert_close(unlabelled_loss(real, fake), expected)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    # -log p(y | x, y <= K), which is -log p(y | x) + log p(y <= K | x) of the K + 1 classes
    conditional = F.cross_entropy(with_zero(real), labels) + p_real.log().mean()
    torch.testing.assert_close(labelled_loss(real, labels), conditional)


def test_losses_in_the_form_of_the_released_code() -> None:
    """-1/2 mean Z + 1/2 mean softplus Z + 1/2 mean softplus Z'."""
    real, fake = torch.randn(7, 5, generator=rng(1)), torch.randn(4, 5, generator=rng(2))
    z, z_fake = real.exp().sum(1).log(), fake.exp().sum(1).log()
    expected = -0.5 * z.mean() + 0.5 * (1 + z.exp()).log().mean() + 0.5 * (1 + z_fake.exp()).log().mean()
    torch.testing.assert_close(unlabelled_loss(real, fake), expected)


def test_a_certain_discriminator_pays_nothing_a_wrong_one_without_overflow_and_a_blind_one_log_two() -> None:
    certain, never = torch.full((2, 3), 200.0), torch.full((2, 3), -200.0)
    assert unlabelled_loss(certain, never).item() == 0
    assert unlabelled_loss(never, certain).item() == pytest.approx(200, rel=1e-6)
    blind = torch.full((2, 3), -math.log(3))  # Z = 0: D = 1/2 of everything
    assert unlabelled_loss(blind, blind).item() == pytest.approx(math.log(2), rel=1e-6)


def test_features_are_matched_in_their_means() -> None:
    real, fake = torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 0.0]])
    assert feature_matching_loss(real, fake, "l1").item() == pytest.approx((1 + 1) / 2)  # means (2, 0) and (1, 1)
    assert feature_matching_loss(real, 4 + real, "squared").item() == pytest.approx(16)
    assert feature_matching_loss(real, 4 + real, "l1").item() == pytest.approx(4)


# --- schedule and optimiser -------------------------------------------------------------------------------------------


def test_the_step_size_is_the_papers_in_epochs_of_twice_the_images() -> None:
    """CIFAR-10: 3e-4 min(3 - epoch / 400, 1) for 1,200 epochs of 50,000 images for D and as many for G."""
    config = Config("cifar10", learning_rate=3e-4, decay_start=80_000_000, decay_end=120_000_000)
    for epoch in (0, 400, 799, 800, 900, 1000, 1199, 1200):
        expected = 3e-4 * min(3 - epoch / 400, 1)
        assert step_size(config, epoch * 100_000) == pytest.approx(expected, abs=1e-12)
    assert step_size(config, 130_000_000) == 0
    assert step_size(Config(learning_rate=0.003), 10**9) == 0.003


@both
def test_both_networks_step_at_the_size_of_the_clock(config: Config) -> None:
    model = build(replace(config, decay_start=100, decay_end=200), SHAPES[config])
    for images_seen, share in ((0, 1.0), (150, 0.5), (400, 0.0)):
        model.step(replace(some_batch(config), images_seen=images_seen), rng())
        for optimizer in model.optimizers().values():
            assert optimizer.param_groups[0]["lr"] == pytest.approx(share * config.learning_rate)


def test_adams_step_is_the_released_codes_to_a_factor_of_root_two() -> None:
    """m / sqrt(v + 1e-8) there, m / (sqrt(v) + 1e-4) here, for constant gradients of any size."""
    for gradient in (1e-8, 1e-5, 1e-4, 1e-3, 1.0):
        weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        adam = torch.optim.Adam([weight], lr=1.0, betas=(0.5, 0.999), eps=ADAM_EPS)
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        adam.step()
        theirs = gradient / math.sqrt(gradient**2 + 1e-8)
        assert 1 - 1e-9 <= theirs / -weight.item() <= math.sqrt(2) + 1e-9
        if gradient in (1e-8, 1.0):
            assert theirs / -weight.item() == pytest.approx(1, rel=2e-4)


# --- networks ---------------------------------------------------------------------------------------------------------


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_of_the_papers_networks() -> None:
    mnist = build(Config(), ImageShape(1, 28, 28))
    assert count(mnist.g) == 100 * 500 + 500 + 500 * 500 + 500 + 500 * 784 + 2 * 784
    layers = [784, 1000, 500, 250, 250, 250, 10]
    assert count(mnist.d) == sum(a * b + b for a, b in pairwise(layers)) + 10
    for name, n in (("svhn", 64), ("cifar10", 96)):
        model = build(Config(name), ImageShape(3, 32, 32))  # type: ignore[arg-type]
        flat = 512 * 16
        assert count(model.g) == 101 * flat + 25 * (512 * 256 + 256 * 128 + 128 * 3) + 256 + 128 + 2 * 3
        kernels = 9 * (3 * n + 2 * n * n + n * 2 * n + 3 * 4 * n * n) + 2 * 4 * n * n
        assert count(model.d) == kernels + 3 * n + 6 * 2 * n + 2 * n * 10 + 2 * 10


def test_weights_start_as_the_released_code_says() -> None:
    torch.manual_seed(0)
    dense, convolutional = build(Config(), ImageShape(1, 28, 28)), build(Config("svhn"), ImageShape(3, 32, 32))
    for network, std in ((dense.d, 0.1), (convolutional.d, 0.05), (convolutional.g, 0.05)):
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * module.weight.numel()))
    hidden = next(m for m in dense.g.modules() if isinstance(m, nn.Linear))
    assert hidden.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 600), rel=1e-3)
    assert hidden.weight.std().item() == pytest.approx(math.sqrt(2 / 600), rel=0.02)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (8, 8), (32, 64), (48, 48)])
def test_a_side_that_the_convolutions_do_not_fit_is_refused_by_name(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height}x{width}.*--model.architecture mnist"):
        build(CONVOLUTIONAL, ImageShape(3, height, width))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(classes=0), "classes is 0"),
        (Config(width=0.0), "width is 0"),
        (Config(decay_start=5, decay_end=5), "decay_start is 5 and decay_end 5"),
        (Config(decay_start=5), "decay_start is 5, and without a decay_end"),
        (Config(unlabelled_weight=-0.5), "unlabelled_weight is -0.5"),
    ],
)
def test_impossible_settings_are_refused_by_name(config: Config, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(config, ImageShape(1, 8, 8))


def test_pixels_are_scaled_as_each_experiment_scales_them_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    ends = {name: (scale.scaled(levels)[0].item(), scale.scaled(levels)[-1].item()) for name, scale in PIXELS.items()}
    assert ends["mnist"] == (0, 1)
    assert ends["svhn"] == (-1, 1)
    assert ends["cifar10"] == (-127.5 / 128, 127.5 / 128)
    for scale in PIXELS.values():
        torch.testing.assert_close(scale.to_unit(scale.scaled(levels)), levels / 255)
        assert scale.to_unit(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


# --- noise ------------------------------------------------------------------------------------------------------------


def test_gaussian_noise_is_added_before_every_layer_and_to_no_feature() -> None:
    d = learner(DENSE).d
    x = torch.rand(4000, 1, 8, 8, generator=rng(2))
    noise = d.noise(4000, rng(3))
    assert [each.shape[1] for each in noise] == [64, 50, 25, 12, 12, 12]
    for each, std in zip(noise, (0.3, *[0.5] * 5), strict=True):
        assert each.std().item() == pytest.approx(std, rel=0.02)
        assert each.mean().item() == pytest.approx(0, abs=0.01)
    last = [torch.zeros_like(each) for each in noise[:-1]] + [noise[-1]]
    (f, logits), (f_noisy, logits_noisy) = d(x), d(x, last)
    assert torch.equal(f, f_noisy), "features are taken before their noise"
    assert not torch.equal(logits, logits_noisy)
    torch.testing.assert_close(logits_noisy, d.classify(f + noise[-1]))


def test_dropout_keeps_the_mean() -> None:
    noise = learner(CONVOLUTIONAL).d.noise(500, rng(3))
    assert [tuple(each.shape[1:]) for each in noise] == [(3, 16, 16), (4, 8, 8), (8, 4, 4)]
    for each, share in zip(noise, (0.2, 0.5, 0.5), strict=True):
        assert set(each.unique().tolist()) == {0.0, torch.tensor(1 / (1 - share)).item()}
        assert (each == 0).float().mean().item() == pytest.approx(share, abs=0.02)


@both
def test_noise_is_off_where_it_classifies_and_on_where_it_trains(config: Config) -> None:
    model = learner(config)
    x = some_images(config, 5)
    assert torch.equal(model.classify(x), model.classify(x))
    torch.testing.assert_close(model.classify(x[:2]), model.classify(x)[:2])
    scaled = model.pixels.scaled(x)
    assert torch.equal(model.classify(x), model.d(scaled)[1])
    first, second = (model._noisy(scaled, rng(seed))[1] for seed in (1, 2))
    assert not torch.equal(first, second)


# --- the first data ---------------------------------------------------------------------------------------------------


@both
def test_the_first_data_give_every_layer_outputs_of_mean_zero_and_its_deviation(config: Config) -> None:
    model = learner(config)
    batch = some_batch(config)
    model.initialise(batch, rng(4))
    assert batch.labelled is not None
    generator, dense = rng(4), config.architecture == "mnist"
    if not dense:
        drawn = model.g(torch.rand(12, 6, generator=generator))
        _assert_standardised(drawn.atanh(), 0.1)
    x = model.pixels.scaled(batch.images if dense else batch.labelled.images)
    _, logits = model.d(x, model.d.noise(len(x), generator))
    _assert_standardised(logits, 1.0 if dense else 0.1)


def _assert_standardised(outputs: Tensor, std: float) -> None:
    flat = outputs.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(len(flat)), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(1, correction=0), torch.full((len(flat),), std), rtol=1e-3, atol=0)


# --- the step ---------------------------------------------------------------------------------------------------------


@both
def test_the_step_is_the_update_of_d_and_then_that_of_g_by_the_written_losses(config: Config) -> None:
    """Written out with the K + 1 softmax, separate passes and plain autograd."""
    model, twin, batch = learner(config), learner(config), some_batch(config)
    metrics = model.step(batch, rng(4))

    generator, dense = rng(4), config.architecture == "mnist"
    assert batch.labelled is not None
    x_lab, x_unl, x_target = (
        twin.pixels.scaled(images) for images in (batch.labelled.images, batch.images[:6], batch.images[6:])
    )
    fake = twin.g(torch.rand(6, 6, generator=generator)).detach()
    noise = twin.d.noise(18, generator)
    lab, unl, gen = (twin.d(x, [each[i : i + 6] for each in noise])[1] for x, i in ((x_lab, 0), (x_unl, 6), (fake, 12)))
    loss_lab = F.cross_entropy(lab, batch.labelled.labels)
    p_real, p_fake = (torch.softmax(with_zero(own), 1)[:, :3].sum(1) for own in (unl, gen))
    loss_unl = 0.5 * (-p_real.log().mean() - (1 - p_fake).log().mean())
    _update(twin.d, twin.optimizer_d, loss_lab + loss_unl)

    target = twin.d(x_target, twin.d.noise(6, generator))[0].detach()
    drawn = twin.d(twin.g(torch.rand(6, 6, generator=generator)), twin.d.noise(6, generator))[0]
    difference = target.mean(0) - drawn.mean(0)
    loss_g = difference.square().mean() if dense else difference.abs().mean()
    _update(twin.g, twin.optimizer_g, loss_g)

    expected = {"loss_lab": loss_lab, "loss_unl": loss_unl, "loss_g": loss_g}
    expected |= {"p_real": p_real.mean(), "p_fake": p_fake.mean()}
    expected["error_lab"] = (lab.argmax(1) != batch.labelled.labels).float().mean()
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    mine, theirs = state(model), state(twin)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=config.learning_rate * 0.05)


def _update(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    for p, gradient in zip(network.parameters(), torch.autograd.grad(loss, [*network.parameters()]), strict=True):
        p.grad = gradient
    optimizer.step()


@both
def test_labels_of_unlabelled_images_are_never_looked_at(config: Config) -> None:
    results = []
    for label in (UNKNOWN, 0, 2):
        model = learner(config)
        batch = replace(some_batch(config), labels=torch.full((12,), label))
        model.initialise(batch, rng(3))
        model.step(batch, rng(4))
        results.append(state(model))
    assert all(torch.equal(value, other[name]) for other in results[1:] for name, value in results[0].items())
    changed = some_batch(config)
    assert changed.labelled is not None
    changed = replace(changed, labelled=Labelled(changed.labelled.images, 2 - changed.labelled.labels))
    model = learner(config)
    model.initialise(changed, rng(3))
    model.step(changed, rng(4))
    assert any(not torch.equal(value, results[0][name]) for name, value in state(model).items())


def test_without_a_labelled_subset_the_labels_of_ds_half_are_used() -> None:
    images, labels = some_images(DENSE, 12), torch.arange(12) % 3
    supervised, told = learner(DENSE), learner(DENSE)
    supervised.step(Batch(images, labels, 0), rng(4))
    told.step(Batch(images, torch.full((12,), UNKNOWN), 0, labelled=Labelled(images[:6], labels[:6])), rng(4))
    assert all(torch.equal(value, state(told)[name]) for name, value in state(supervised).items())


def test_a_share_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 image\(s\).*--training.batch-size"):
        learner(DENSE).step(some_batch(DENSE, 3), rng())


@both
def test_frozen_gains_stay_and_those_of_the_logits_learn(config: Config) -> None:
    model = learner(config)
    model.initialise(some_batch(config), rng(1))
    before = state(model)
    for seed in range(3):
        model.step(some_batch(config, seed=seed), rng(seed))
    gains = {name: torch.equal(value, before[name]) for name, value in state(model).items() if name.endswith("gain")}
    learnt = {name for name, same in gains.items() if not same}
    assert learnt == {"generator.draw.gain", "discriminator.classify.gain"}
    assert len(gains) > 2


# --- what it is for ---------------------------------------------------------------------------------------------------


@both
def test_evaluation_counts_wrong_classes_and_nats(config: Config) -> None:
    model, images = learner(config), some_images(config, 9)
    labels = torch.arange(9) % 3
    values = model.evaluate(Batch(images, labels, 0), rng())
    logits = model.classify(images)
    assert values["error"].tolist() == [float(row.argmax() != label) for row, label in zip(logits, labels, strict=True)]
    expected = [-math.log(torch.softmax(row, 0)[label]) for row, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(values["cross_entropy"], torch.tensor(expected))


@both
def test_the_published_classifier_says_what_the_learner_says_and_does_not_follow_its_training(config: Config) -> None:
    model, images = learner(config), some_images(config, 5)
    module, example = model.export_classifier()
    assert not module.training and example.shape[1:] == images.shape[1:]
    before = module(images / 255)
    torch.testing.assert_close(before, torch.softmax(model.classify(images), 1), rtol=1e-4, atol=1e-6)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.testing.assert_close(program.module()(images / 255), before)
    model.step(some_batch(config), rng())
    assert torch.equal(module(images / 255), before)
    assert all(p.requires_grad for p in model.d.parameters())


@pytest.mark.parametrize(
    ("p_real", "p_fake", "error", "words"),
    [(0.8, 0.2, 0.7, "not being learnt"), (0.995, 0.004, 0.0, "certain"), (0.8, 0.75, 0.0, "fools")],
)
def test_a_run_that_goes_wrong_is_said(p_real: float, p_fake: float, error: float, words: str) -> None:
    (sentence,) = learner(DENSE).diagnose({"p_real": p_real, "p_fake": p_fake, "error_lab": error})
    assert words in sentence


def test_a_healthy_run_is_not_commented() -> None:
    assert learner(DENSE).diagnose({"p_real": 0.85, "p_fake": 0.16, "error_lab": 0.01}) == []
