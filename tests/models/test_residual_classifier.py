"""The residual classifier: its network, its crops, its schedule, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from models.classifier import residual
from models.classifier.residual import Block, Config, shown, stages_of, step_size
from models.contract import Batch, ImageShape


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_block_is_its_input_and_what_two_convolutions_add() -> None:
    torch.manual_seed(0)
    block, h = Block(16), torch.randn(3, 16, 5, 5, generator=rng())
    (first, norm_1), (second, norm_2) = block.first, block.second  # type: ignore[misc]

    def normalised(x: torch.Tensor, groups: int) -> torch.Tensor:
        parts = x.unflatten(1, (groups, -1)).flatten(2)
        centred = parts - parts.mean(2, keepdim=True)
        return (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).view_as(x)

    inner = normalised(F.conv2d(h, first.weight, padding=1), 2).clamp(min=0)
    expected = (h + normalised(F.conv2d(inner, second.weight, padding=1), 2)).clamp(min=0)
    torch.testing.assert_close(block(h), expected)
    torch.nn.init.zeros_(norm_2.weight)
    torch.testing.assert_close(block(h), h.clamp(min=0))
    assert norm_1.num_groups == 2


@pytest.mark.parametrize(("side", "stages", "last"), [(12, 2, 3), (28, 3, 3), (32, 3, 4), (48, 4, 3), (64, 4, 4)])
def test_the_last_map_has_a_side_of_three_or_four(side: int, stages: int, last: int) -> None:
    shape = ImageShape(3, side, side)
    learner = residual.build(Config(width=8), shape)
    assert stages_of(shape) == stages
    trunk = learner.network.trunk(torch.zeros(1, 3, side, side))
    assert trunk.shape == (1, 8 * 2 ** min(stages, 3), last, last)
    features, logits = learner.features(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    assert features.shape == (2, trunk.shape[1]) and logits.shape == (2, 10)


def test_crops_are_pieces_of_the_padded_image() -> None:
    x = torch.rand(40, 2, 6, 5, generator=rng())
    padded = F.pad(x, (2, 2, 2, 2))
    straight, mirrored = shown(x, 2, False, rng(1)), shown(x, 2, True, rng(1))
    places = set()
    for i in range(len(x)):
        pieces = {(a, b): padded[i, :, a : a + 6, b : b + 5] for a in range(5) for b in range(5)}
        (place,) = [at for at, piece in pieces.items() if torch.equal(piece, straight[i])]
        assert torch.equal(mirrored[i], straight[i]) or torch.equal(mirrored[i], straight[i].flip(2))
        places.add(place)
    turned = sum(not torch.equal(a, b) for a, b in zip(mirrored, straight, strict=True))
    assert len(places) > 15 and 10 <= turned <= 30
    assert torch.equal(shown(x, 0, False, rng()), x)


def test_the_step_size_rises_in_a_line_and_falls_in_a_half_cosine() -> None:
    config = Config(learning_rate=0.4, warm_up=0.25, decay_end=1_000)
    expected = {0: 0.0, 125: 0.2, 250: 0.4, 500: 0.2 * (1 + math.cos(math.pi / 3)), 625: 0.2, 1_000: 0.0, 9_999: 0.0}
    assert {n: step_size(config, n) for n in expected} == pytest.approx(expected)
    assert step_size(Config(warm_up=0.0, learning_rate=1.0), 0) == 1.0
    learner = residual.build(Config(classes=2, width=8, decay_end=80), ImageShape(1, 6, 6))
    learner.step(Batch(torch.zeros(40, 1, 6, 6, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64), 0), rng())
    assert {group["lr"] for group in learner.optimizer.param_groups} == {step_size(learner.config, 40)}


def test_only_weights_decay_and_labels_are_smoothed() -> None:
    torch.manual_seed(0)
    config = Config(classes=4, width=8, padding=0, mirror=False, smoothing=0.2, warm_up=0.0, decay_end=10)
    learner = residual.build(config, ImageShape(1, 6, 6))
    decays = {p.dim() > 1: g["weight_decay"] for g in learner.optimizer.param_groups for p in g["params"]}
    assert decays == {True: 5e-4, False: 0.0}
    x, y = torch.randint(0, 256, (3, 1, 6, 6), dtype=torch.uint8, generator=rng()), torch.tensor([0, 3, 1])
    log_p = learner.classify(x).log_softmax(1)
    q = torch.full((3, 4), 0.05) + 0.8 * F.one_hot(y, 4)
    assert float(learner.step(Batch(x, y, 0), rng())["loss"]) == pytest.approx(
        float(-(q * log_p).sum(1).mean()), rel=1e-5
    )


def test_it_tells_bars_from_columns_and_publishes_that() -> None:
    """Images of noise with a bright line across or down."""
    torch.manual_seed(0)
    learner = residual.build(Config(classes=2, width=8, decay_end=1_200, learning_rate=0.05), ImageShape(1, 8, 8))

    def batch(seed: int, seen: int = 0) -> Batch:
        generator = rng(seed)
        x = torch.randint(0, 120, (30, 1, 8, 8), generator=generator)
        y = torch.arange(30) % 2
        for image, label, at in zip(
            x, y.tolist(), torch.randint(0, 8, (30,), generator=generator).tolist(), strict=True
        ):
            (image[0, at] if label else image[0, :, at]).add_(130)
        return Batch(x.to(torch.uint8), y, seen)

    for step in range(40):
        learner.step(batch(step, step * 30), rng(step))
    held_out = batch(1_000)
    assert learner.evaluate(held_out, rng())["error"].mean() <= 0.1
    module, example = learner.export_classifier()
    probabilities = module(held_out.images.float() / 255)
    torch.testing.assert_close(probabilities, learner.classify(held_out.images).softmax(1))
    assert module(example).shape == (2, 2) and learner.network.training


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"width": 12}, "choose a multiple"), ({"warm_up": 1.0}, "are shares"), ({"classes": 0}, "classes is 0")],
)
def test_impossible_settings_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        residual.build(Config(**settings), ImageShape(1, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a side of 6 is the least"):
        residual.build(Config(), ImageShape(1, 5, 8))
