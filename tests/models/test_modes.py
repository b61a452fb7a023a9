"""Modes by hand, and the two biases that the docstring states by simulation."""

from __future__ import annotations

import math

import pytest
import torch

from models.metrics.modes import (
    STACKED_MODES,
    Modes,
    class_counts,
    kl_of_even_samples,
    modes,
    modes_of,
    protocol,
    stacked_modes,
)


def drawn(n: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def test_all_alike_and_all_of_one() -> None:
    assert modes(torch.arange(10).repeat(7), 10) == Modes(covered=10, of=10, kl=0)
    one = modes(torch.full((50,), 3), 10)
    assert (one.covered, one.of) == (1, 10) and one.kl == pytest.approx(math.log(10))


def test_shares_of_a_half_and_two_quarters_by_hand() -> None:
    """Of four classes: 1/2 log 2 + 2 * 1/4 log 1 = log(2) / 2."""
    found = modes(torch.tensor([2, 2, 0, 1]), 4)
    assert found.covered == 3 and found.kl == pytest.approx(math.log(2) / 2)


def test_half_of_the_classes_evenly_is_log_two_away() -> None:
    assert modes(torch.arange(500), 1000).kl == pytest.approx(math.log(2))


def test_digits_of_red_green_blue_are_hundreds_tens_ones() -> None:
    digits = torch.tensor([[0, 0, 0], [9, 9, 9], [1, 2, 3], [3, 2, 1], [0, 0, 7]], dtype=torch.uint8)
    assert stacked_modes(digits).tolist() == [0, 999, 123, 321, 7]
    every = torch.cartesian_prod(*[torch.arange(10)] * 3)
    assert stacked_modes(every).tolist() == list(range(STACKED_MODES))


def test_a_generator_that_never_draws_a_seven_covers_nine_cubed() -> None:
    """KL = log 1000 - log 729 = 3 log(10 / 9)."""
    every = torch.cartesian_prod(*[torch.arange(10)] * 3)
    found = modes(stacked_modes(every[(every != 7).all(dim=1)]), STACKED_MODES)
    assert found.covered == 729 and found.kl == pytest.approx(3 * math.log(10 / 9))


def test_counts_of_workers_add_up() -> None:
    predicted = drawn(5000, 50)
    counts = [class_counts(part, 50) for part in predicted.split(700)]
    assert modes_of(torch.stack(counts).sum(dim=0)) == modes(predicted, 50)
    assert class_counts(predicted[:0], 50).tolist() == [0] * 50


def test_even_samples_have_the_kl_and_miss_the_classes_that_are_said() -> None:
    assert kl_of_even_samples(26_000, 1000) == pytest.approx(0.0192, abs=1e-4)
    at_26_000 = [modes(drawn(26_000, 1000, seed), 1000) for seed in range(40)]
    assert sum(m.kl for m in at_26_000) / 40 == pytest.approx(kl_of_even_samples(26_000, 1000), rel=0.03)
    assert all(m.covered == 1000 for m in at_26_000)
    few = [modes(drawn(1000, 1000, seed), 1000).covered for seed in range(20)]
    assert 1000 - sum(few) / 20 == pytest.approx(1000 * (1 - 1 / 1000) ** 1000, rel=0.03)


def test_the_protocol_says_the_classes() -> None:
    assert protocol(STACKED_MODES) == "modes-1 classes=1000"


def test_what_has_no_modes_is_refused() -> None:
    for wrong in ([10], [-1]):
        with pytest.raises(ValueError, match="not in 0 … 9"):
            modes(torch.tensor(wrong), 10)
    with pytest.raises(ValueError, match="one image or more"):
        modes(torch.empty(0, dtype=torch.long), 10)
    with pytest.raises(ValueError, match="whole numbers"):
        modes(torch.tensor([0.5]), 10)
    with pytest.raises(ValueError, match="whole numbers"):
        stacked_modes(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="a digit is not in"):
        stacked_modes(torch.tensor([[0, 10, 0]]))
