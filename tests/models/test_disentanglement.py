"""Disentanglement and clustering figures against values by hand, closed forms and double loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from models.metrics.disentanglement import (
    best_assignment,
    correlation,
    entropy,
    information,
    majority_accuracy,
    majority_classes,
    mutual_information,
    mutual_information_gap,
    normalised_information,
    one_to_one_accuracy,
    rank_correlation,
    table,
)


def grid(*sides: int) -> Tensor:
    """Every combination of 0 … side - 1 once: columns that are exactly independent and uniform."""
    return torch.tensor(list(itertools.product(*map(range, sides))), dtype=torch.float32)


def normal(n: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed))


def test_correlation_by_hand() -> None:
    """Of 0, 1, 2 with 0, 1, 0 it is 0; with 0, 2, 1: covariance 1, both variances 2 (times 3)."""
    codes = torch.tensor([[0.0], [1.0], [2.0]])
    factors = torch.tensor([[0.0, 0.0, 4.0, 7.0], [1.0, 2.0, 2.0, 7.0], [0.0, 1.0, 0.0, 7.0]])
    assert correlation(codes, factors).tolist()[0] == pytest.approx([0, 0.5, 1, 0])  # a constant says nothing


def test_correlation_is_that_of_torch_and_of_no_unit() -> None:
    codes, factors = normal(200, 3), normal(200, 2, seed=1)
    factors[:, 0] += codes[:, 2]
    expected = torch.corrcoef(torch.cat([codes, factors], dim=1).double().T)[:3, 3:].abs()
    assert torch.allclose(correlation(codes, factors), expected)
    assert torch.allclose(correlation(codes * -1e3 + 5, factors * 1e-3), expected)


def test_a_constant_that_no_mean_hits_exactly_has_no_correlation() -> None:
    codes = torch.full((1000, 1), 0.1)
    assert correlation(codes, normal(1000, 1)).item() == 0


def test_ranks_see_a_bent_relation_whole_and_share_ties() -> None:
    x = normal(100, 1)
    assert rank_correlation(x, -x.exp()).item() == pytest.approx(1) and correlation(x, -x.exp()).item() < 0.95
    # 1, 2, 2, 3 has ranks 0, 1.5, 1.5, 3; against 0, 1, 2, 3: covariance 4.5, variances 4.5 and 5.
    tied, plain = torch.tensor([[1.0], [2.0], [2.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert rank_correlation(tied, plain).item() == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize(("codes", "factors"), [(3, 3), (5, 3), (2, 4), (1, 1)])
def test_assignment_is_the_best_of_all(codes: int, factors: int) -> None:
    for seed in range(20):
        strength = normal(codes, factors, seed).abs().double()
        chosen = best_assignment(strength)
        used = [code for code in chosen if code is not None]
        assert len(used) == len(set(used)) == min(codes, factors)
        got = sum(float(strength[code, f]) for f, code in enumerate(chosen) if code is not None)
        if codes >= factors:
            choices = itertools.permutations(range(codes), factors)
            best = max(sum(float(strength[c, f]) for f, c in enumerate(p)) for p in choices)
        else:
            choices = itertools.permutations(range(factors), codes)
            best = max(sum(float(strength[c, f]) for c, f in enumerate(p)) for p in choices)
        assert got == pytest.approx(best)


def test_assignment_gives_a_code_away_where_that_helps_another_factor() -> None:
    """Code 0 is the best of both factors, and yet becomes the one that no other code is near."""
    assert best_assignment(torch.tensor([[0.9, 0.8], [0.7, 0.1]])) == [1, 0]
    assert best_assignment(torch.ones(3, 2)) == [0, 1]  # of equal ones the earlier codes


def test_information_of_small_tables_by_hand() -> None:
    assert entropy(torch.tensor([1, 1, 1, 1])) == pytest.approx(math.log(4))
    assert entropy(torch.tensor([5, 0])) == 0
    assert information(torch.tensor([[2, 0], [0, 2]])) == pytest.approx(math.log(2))
    assert information(torch.tensor([[1, 1], [1, 1]])) == 0
    # shares 1/2 and 0, 1/4 and 1/4: the rows have log 2, the columns that of 3/4 and 1/4, the table 3/2 log 2
    column = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert information(torch.tensor([[2, 0], [1, 1]])) == pytest.approx(math.log(2) + column - 1.5 * math.log(2))


def test_codes_that_are_the_factors_have_gap_one() -> None:
    factors = grid(20, 20)
    codes = torch.stack([factors[:, 1] * -3 + 1, factors[:, 0] / 7], dim=1)
    told = mutual_information(codes, factors)
    assert torch.allclose(told, torch.tensor([[0, math.log(20)], [math.log(20), 0]], dtype=torch.float64), atol=1e-12)
    assert mutual_information_gap(codes, factors).tolist() == pytest.approx([1, 1])
    assert mutual_information_gap(codes[:, :1], factors).tolist() == pytest.approx([0, 1])  # no second code


def test_a_code_that_tells_half_has_half_the_gap_and_two_alike_have_none() -> None:
    """A factor of four values, a code that says which half: log 2 of log 4."""
    factors = grid(4, 6)[:, :1]
    half, other = (factors >= 2).float(), grid(4, 6)[:, 1:]
    assert mutual_information_gap(torch.cat([half, other], dim=1), factors).tolist() == pytest.approx([0.5])
    assert mutual_information_gap(torch.cat([half, factors], dim=1), factors).tolist() == pytest.approx([0.5])
    assert mutual_information_gap(torch.cat([factors, factors], dim=1), factors).tolist() == [0]


def test_independent_codes_have_about_no_gap_and_the_bias_that_is_said() -> None:
    codes = torch.rand(2000, 5, generator=torch.Generator().manual_seed(0))
    factors = torch.rand(2000, 4, generator=torch.Generator().manual_seed(1))
    assert float(mutual_information(codes, factors).mean()) == pytest.approx(19**2 / 4000, rel=0.15)
    assert mutual_information_gap(codes, factors).max() < 0.01


def test_information_is_that_of_a_double_loop() -> None:
    codes, factors = normal(300, 1), normal(300, 1, seed=1)
    factors += codes
    counts = [[0] * 5 for _ in range(5)]
    for c, f in zip(codes[:, 0].tolist(), factors[:, 0].tolist(), strict=True):
        place = []
        for value, column in ((c, codes), (f, factors)):
            low, high = float(column.min()), float(column.max())
            place.append(min(int((value - low) / (high - low) * 5), 4))
        counts[place[0]][place[1]] += 1
    total = 0.0
    for i, j in itertools.product(range(5), range(5)):
        row, column_sum = sum(counts[i]), sum(r[j] for r in counts)
        if counts[i][j]:
            total += counts[i][j] / 300 * math.log(counts[i][j] * 300 / (row * column_sum))
    assert mutual_information(codes, factors, bins=5).item() == pytest.approx(total)


# Rows: categories 0 … 3, columns: classes 0 … 2. Category 2 is empty, 0 is tied between classes 0 and 2.
CONFUSION = ((3, 1, 3), (0, 5, 1), (0, 0, 0), (4, 2, 0))


def confused() -> tuple[Tensor, Tensor]:
    places = [(c, k) for c, row in enumerate(CONFUSION) for k, count in enumerate(row) for _ in range(count)]
    categories, labels = torch.tensor(places).T
    return categories, labels


def test_majority_mapping_of_a_hand_made_table() -> None:
    """A tie goes to the lower class, an empty category to none; 3 + 5 + 4 of 19 images are right."""
    categories, labels = confused()
    assert table(categories, labels).tolist() == [list(row) for row in CONFUSION]
    assert majority_classes(categories, labels).tolist() == [0, 1, -1, 0]
    assert majority_accuracy(categories, labels) == pytest.approx(12 / 19)


def test_one_to_one_takes_the_tied_category_for_the_class_that_is_free() -> None:
    """0 -> 2, 1 -> 1, 3 -> 0: the same 12. With categories 0 and 3 alone classes 2 and 0: 7 of 13."""
    categories, labels = confused()
    assert one_to_one_accuracy(categories, labels) == pytest.approx(12 / 19)
    split = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 0])  # one class in two categories
    assert majority_accuracy(*split) == 1 and one_to_one_accuracy(*split) == 0.5


def test_classes_that_are_absent_count_for_nothing() -> None:
    categories, labels = torch.tensor([0, 0, 5, 5]), torch.tensor([7, 7, 2, 7])
    assert majority_classes(categories, labels).tolist() == [7, -1, -1, -1, -1, 2]
    assert majority_accuracy(categories, labels) == 0.75
    assert one_to_one_accuracy(categories, labels) == 0.75


def test_normalised_information_of_extremes() -> None:
    classes = torch.arange(12) % 3
    assert normalised_information((classes + 1) % 3, classes) == pytest.approx(1)
    assert normalised_information(torch.arange(12) // 6, classes) == pytest.approx(0)
    assert normalised_information(torch.zeros(12, dtype=torch.long), classes) == 0
    # Two of four classes in each of two categories: I = log 2, mean entropy (log 2 + log 4) / 2.
    assert normalised_information(torch.arange(8) % 4 // 2, torch.arange(8) % 4) == pytest.approx(2 / 3)


def test_what_has_no_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="of one N"):
        correlation(torch.zeros(3, 1), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="not finite"):
        mutual_information(torch.tensor([[math.nan], [0.0]]), torch.rand(2, 1))
    with pytest.raises(ValueError, match="factor 1 is the same in all 4 images"):
        mutual_information_gap(torch.rand(4, 2), torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]))
    with pytest.raises(ValueError, match="is not known"):
        majority_accuracy(torch.tensor([0, 1]), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="one length"):
        majority_accuracy(torch.tensor([0, 1]), torch.tensor([0]))
