"""The moving average against numbers worked out by hand."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.training.ema import Ema


def _network(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_after_one_half_life_the_old_weight_counts_half() -> None:
    layer = _network(0.0)
    ema = Ema({"net": layer}, half_life=100)
    nn.init.constant_(layer.weight, 1.0)
    ema.update(images=100, images_seen=10_000)
    torch.testing.assert_close(ema.state["net.weight"], torch.tensor([[0.5]]))
    ema.update(images=200, images_seen=10_200)  # two more half-lives: an eighth of the start is left
    torch.testing.assert_close(ema.state["net.weight"], torch.tensor([[0.875]]))


def test_the_average_does_not_depend_on_how_images_are_cut_into_batches() -> None:
    averages = []
    for batch in (50, 10):
        layer = _network(0.0)
        ema = Ema({"net": layer}, half_life=70)
        nn.init.constant_(layer.weight, 1.0)
        for i in range(100 // batch):
            ema.update(images=batch, images_seen=10_000 + batch * (i + 1))
        averages.append(ema.state["net.weight"])
    torch.testing.assert_close(averages[0], averages[1])


def test_early_in_a_run_the_half_life_is_a_tenth_of_the_images_seen() -> None:
    layer = _network(0.0)
    ema = Ema({"net": layer}, half_life=1_000_000)
    nn.init.constant_(layer.weight, 1.0)
    ema.update(images=10, images_seen=100)
    torch.testing.assert_close(ema.state["net.weight"], torch.tensor([[0.5]]))


def test_swapped_in_shows_the_average_and_gives_the_weights_back_to_the_bit() -> None:
    layer = _network(0.1)
    ema = Ema({"net": layer}, half_life=100)
    nn.init.constant_(layer.weight, 0.7)
    before = layer.weight.detach().clone()
    with ema.swapped_in():
        torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.1]]))
    assert torch.equal(layer.weight.detach(), before)
    torch.testing.assert_close(ema.state["net.weight"], torch.tensor([[0.1]]))


def test_buffers_are_copied_not_averaged() -> None:
    norm = nn.BatchNorm1d(2)
    ema = Ema({"norm": norm}, half_life=100)
    norm(torch.randn(4, 2) + 5)
    nn.init.constant_(norm.weight, 3.0)
    ema.update(images=100, images_seen=10_000)
    assert norm.running_mean is not None and norm.running_mean.abs().min() > 0.1
    assert torch.equal(ema.state["norm.running_mean"], norm.running_mean)
    assert ema.state["norm.num_batches_tracked"] == 1
    torch.testing.assert_close(ema.state["norm.weight"], torch.full((2,), 2.0))  # half of 1, half of 3


def test_the_very_first_images_of_a_run_have_a_half_life_below_one() -> None:
    layer = _network(0.0)
    ema = Ema({"net": layer}, half_life=100)
    nn.init.constant_(layer.weight, 1.0)
    ema.update(images=1, images_seen=5)  # half-life 0.5: two of them
    torch.testing.assert_close(ema.state["net.weight"], torch.tensor([[0.75]]))
