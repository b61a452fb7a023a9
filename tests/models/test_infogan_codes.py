"""What the codes of an InfoGAN are good for: read off images, walked along, measured; a toy where they come back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.contract import UNKNOWN, Batch, ImageShape
from models.gan.codes import told_of_factors
from models.gan.infogan import UNREAD_FIXED, UNREAD_LEARNED, Config, InfoGAN, build
from tests.models.test_infogan import SMALL, learner, rng, some_batch

# --- codes that come back ---------------------------------------------------------------------------------------------


def two_kinds(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """8x8 images of a bright left or a bright upper half, uint8 (n, 1, 8, 8) with a little noise, and which."""
    labels = torch.randint(2, (n,), generator=rng(seed))
    images = torch.randint(0, 60, (n, 1, 8, 8), generator=rng(seed + 1), dtype=torch.uint8)
    images[labels == 0, :, :, :4] += 180
    images[labels == 1, :, :4] += 180
    return images, labels


def test_the_two_kinds_of_a_toy_become_the_two_categories() -> None:
    config = Config(
        noise=4,
        categories=(2,),
        continuous=0,
        generator_width=16,
        discriminator_width=16,
        hidden=32,
        generator_rate=2e-3,
        discriminator_rate=1e-3,
    )
    torch.manual_seed(0)
    model, generator = build(config, ImageShape(1, 8, 8)), rng(2)
    images, labels = two_kinds(512, seed=1)
    first = model.evaluate(some_batch(100), rng(1))["mi_categorical"].mean().item()
    for _ in range(500):
        rows = torch.randint(512, (32,), generator=generator)
        model.step(Batch(images[rows], labels[rows], 0), generator)
    bounds = model.evaluate(some_batch(100), rng(1))
    assert first < 0.1
    assert 0.9 * math.log(2) < bounds["mi_categorical"].mean().item() <= math.log(2) + 1e-6
    assert torch.equal(bounds["mi_bound"], bounds["mi_categorical"]), "the only codes there are"
    held_out, kinds = two_kinds(200, seed=7)
    codes = model.encode(Batch(held_out, kinds, 0), rng())
    assert model.measure(codes, kinds, {})["category_accuracy"] > 0.97
    walk = model.traverse(4, 2, rng()).images.float() / 255  # a row shows both categories with the same noise
    balance = walk[..., 4:, :4].mean((2, 3, 4)) - walk[..., :4, 4:].mean((2, 3, 4))  # where one of them is bright
    assert (balance[:, 0] * balance[:, 1] < 0).all() and balance.abs().min() > 0.3


# --- reading ----------------------------------------------------------------------------------------------------------


def test_each_code_is_read_under_its_name() -> None:
    model, given = learner(Config(**{**SMALL.__dict__, "names": ("digit category",)})), some_batch(20)
    codes = model.encode(given, rng())
    assert list(codes) == ["digit category", "c2", "c3", "c4"]
    said = model.d(given.images.float() / 255)[1]
    assert torch.equal(codes["digit category"], said[:, :3].argmax(1))
    assert torch.equal(codes["c2"], said[:, 3:5].argmax(1))
    assert torch.equal(torch.stack([codes["c3"], codes["c4"]], dim=1), said[:, 5:])
    alone = model.encode(Batch(given.images[:1], given.labels[:1], 0), rng())  # a share of one image
    assert all(len(code) == 1 and code.isfinite().all() for code in alone.values())


def test_the_means_of_continuous_codes_are_read_not_their_deviations() -> None:
    """Q says, in this order: 2 logits, 2 means, 2 log-variances."""
    model = learner(Config(noise=1, categories=(2,), continuous=2, generator_width=2, hidden=0, learned_deviation=True))
    last = model.d.recognise[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 1.0, 0.25, -0.5, 3.0, 4.0]))
    codes = model.encode(some_batch(3), rng())
    assert {name: code.tolist() for name, code in codes.items()} == {"c1": [1] * 3, "c2": [0.25] * 3, "c3": [-0.5] * 3}


def test_colour_images_are_centred_for_d_and_grey_ones_are_not() -> None:
    for channels, expected in ((1, (0.0, 1.0)), (3, (-1.0, 1.0))):
        model, seen = learner(channels=channels), []
        model.d.shared.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        model.d(torch.stack([torch.zeros(channels, 8, 8), torch.ones(channels, 8, 8)]))
        assert (seen[0].min().item(), seen[0].max().item()) == expected


# --- measuring --------------------------------------------------------------------------------------------------------


def test_each_category_counts_for_its_most_frequent_class_and_the_best_code_is_told() -> None:
    model = learner()  # categorical codes c1 (3) and c2 (2)
    generator = rng(4)
    labels = torch.randint(4, (200,), generator=generator)
    codes = {
        "c1": torch.where(torch.rand(200, generator=generator) < 0.6, labels % 3, torch.tensor(2)),
        "c2": torch.randint(2, (200,), generator=generator),
        "c3": torch.zeros(200),
        "c4": torch.zeros(200),
    }

    def by_hand(name: str) -> float:
        right = 0
        for category in range(3):
            of_it = [int(label) for label, c in zip(labels, codes[name], strict=True) if c == category]
            right += max((of_it.count(label) for label in range(4)), default=0)
        return right / 200

    assert by_hand("c1") > by_hand("c2") + 0.1
    assert model.measure(codes, labels, {})["category_accuracy"] == pytest.approx(by_hand("c1"))
    hidden = torch.cat([labels, torch.full((50,), UNKNOWN)])
    more = {name: torch.cat([code, code[:50]]) for name, code in codes.items()}
    assert model.measure(more, hidden, {})["category_accuracy"] == pytest.approx(by_hand("c1")), "UNKNOWN is no class"


def test_which_code_became_which_factor_is_told_and_how_well() -> None:
    """c3 is the second factor, upside down and with noise, c4 the first one; the third never varies."""
    model, generator = learner(), rng(5)
    factors = torch.rand(4000, 3, generator=generator)
    factors[:, 2] = 0.5
    noise = torch.rand(4000, generator=generator)
    codes = {"c1": torch.zeros(4000, dtype=torch.int64), "c2": torch.zeros(4000, dtype=torch.int64)}
    codes |= {"c3": -factors[:, 1] - 0.5 * noise, "c4": 3 * factors[:, 0] + 1}
    figures = model.measure(codes, torch.zeros(4000, dtype=torch.int64), {"factors": factors})
    with_noise = 1 / math.sqrt(1 + 0.5**2)  # corr(a, a + b/2) of independent ones of equal variance
    assert figures["correlation/c4/factor1"] == pytest.approx(1, abs=1e-6)
    assert figures["correlation/c3/factor2"] == pytest.approx(with_noise, abs=0.01)
    assert max(figures["correlation/c3/factor1"], figures["correlation/c4/factor2"]) < 0.05
    assert (figures["code_of_factor1"], figures["code_of_factor2"]) == (2, 1)
    assert figures["factor_correlation"] == pytest.approx((1 + with_noise) / 2, abs=0.01)
    assert 0.6 < figures["mig"] < 1
    assert not any("factor3" in name for name in figures) and "category_accuracy" not in figures
    one = told_of_factors({"only": codes["c4"]}, factors)
    assert (one["code_of_factor1"], one["code_of_factor2"], one["factor_correlation"]) == (1, 0, pytest.approx(0.5))
    assert told_of_factors({"only": codes["c4"]}, factors[:, 2:]) == {}


# --- walking ----------------------------------------------------------------------------------------------------------


def test_a_walk_changes_one_code_and_nothing_else() -> None:
    model = learner(Config(**{**SMALL.__dict__, "names": ("digit category",)}))
    seen: list[Tensor] = []
    model.g.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    traversal = model.traverse(6, 5, rng())
    assert traversal.titles == ["digit category", "c2", "c3", "c4", "digit category", "c2"]
    assert len(seen) == 1 and len(seen[0]) == 5 * 30, "beside four times as many draws from the priors"
    z = seen[0][:30].view(6, 5, 4 + 3 + 2 + 2)
    parts = [slice(4, 7), slice(7, 9), slice(9, 10), slice(10, 11)]
    for row in range(6):
        walked = parts[row % 4]
        fixed = torch.ones(11, dtype=torch.bool)
        fixed[walked] = False
        assert (z[row][:, fixed] == z[row][:1, fixed]).all()
        assert torch.equal(z[row, 0, fixed], z[row // 4 * 4, 0, fixed]) or row % 4, "one draw for all codes"
    assert torch.equal(z[0, :3, parts[0]], torch.eye(3)) and torch.equal(z[1, :2, parts[1]], torch.eye(2))
    for row in (2, 3):
        assert z[row, :, parts[row]].flatten().tolist() == [-2, -1, 0, 1, 2]
    assert not torch.equal(z[0, 0, :4], z[4, 0, :4]), "another z when the codes come again"
    blank = (traversal.images == 255).flatten(2).all(2)
    assert blank.tolist() == [[False] * n + [True] * (5 - n) for n in (3, 2, 5, 5, 3, 2)]


def test_with_fewer_rows_than_codes_the_first_ones_are_walked_and_with_fewer_steps_the_first_categories() -> None:
    model = learner(Config(noise=1, categories=(4,), continuous=3, generator_width=2, hidden=0))
    traversal = model.traverse(2, 3, rng())
    assert traversal.titles == ["c1", "c2"]
    assert not (traversal.images == 255).flatten(2).all(2).any()


# --- when it goes wrong -----------------------------------------------------------------------------------------------


def test_codes_that_no_image_shows_are_told() -> None:
    healthy = {"p_real": 0.7, "p_fake": 0.3}
    model = learner()  # H(c) of the categorical codes is log 6
    read = {"mi_categorical": 1.5, "mi_continuous": 2 * -0.25}
    assert model.diagnose(healthy | read) == []
    (sentence,) = model.diagnose(healthy | read | {"mi_categorical": 0.02})
    assert "categorical codes are ignored (mi_categorical is 0.02 nats)" in sentence
    (sentence,) = model.diagnose(healthy | read | {"mi_continuous": 2 * UNREAD_FIXED + 0.01})
    assert "continuous codes are ignored" in sentence
    learned = learner(Config(**{**SMALL.__dict__, "learned_deviation": True}))
    assert len(learned.diagnose(healthy | read)) == 1, "-.25 a code would do with a fixed deviation"
    assert learned.diagnose(healthy | read | {"mi_continuous": 2 * UNREAD_LEARNED + 0.5}) == []
    assert any("certain" in s for s in model.diagnose(read | {"p_real": 0.99, "p_fake": 0.01})), "as for any GAN"


def test_without_a_kind_of_code_nothing_is_said_of_it() -> None:
    for config in (
        Config(categories=(), generator_width=2, hidden=0),
        Config(continuous=0, generator_width=2, hidden=0),
    ):
        model: InfoGAN = learner(config)
        metrics = {name: value.item() for name, value in model.step(some_batch(), rng()).items()}
        (kind,) = {name for name in metrics if name.startswith("mi_")} - {"mi_bound"}
        assert metrics["mi_bound"] == metrics[kind]
        assert len([s for s in model.diagnose(metrics | {kind: -9.0}) if "ignored" in s]) == 1
        assert model.traverse(2, 2, rng()).images.shape == (2, 2, 1, 8, 8)


def test_the_published_generator_shows_the_category_that_it_is_given() -> None:
    model = learner()
    module, latents = model.export(rng())
    assert latents.shape == (2, 11)
    other = latents.clone()
    other[:, 4:7] = F.one_hot((latents[:, 4:7].argmax(1) + 1) % 3, 3)
    assert (module(latents) - module(other)).abs().max() > 1e-4
