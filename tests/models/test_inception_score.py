"""The inception score against its extremes, values by hand and a loop."""

from __future__ import annotations

import math

import pytest
import torch

from models.metrics.inception_score import inception_score, protocol, score_of_probabilities


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("classes", [2, 10])
def test_certain_and_balanced_is_the_number_of_classes(classes: int) -> None:
    """Every part has each class as often."""
    certain = torch.eye(classes).repeat(20, 1)
    assert score_of_probabilities(certain) == pytest.approx((classes, 0))


def test_images_that_all_look_alike_score_one() -> None:
    row = torch.softmax(torch.randn(1, 7, generator=rng()), dim=1)
    assert score_of_probabilities(row.repeat(50, 1)) == pytest.approx((1, 0))
    assert score_of_probabilities(torch.eye(7)[:1].repeat(50, 1)) == pytest.approx((1, 0))


def test_two_images_by_hand() -> None:
    """(3/4, 1/4) and (1/4, 3/4) of mean (1/2, 1/2): both diverge by 3/4 log 3/2 + 1/4 log 1/2."""
    expected = math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert score_of_probabilities(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), 1) == pytest.approx((expected, 0))


def test_parts_are_the_rows_of_the_original_code_also_where_they_do_not_divide() -> None:
    """23 rows in 10 parts: of 2 or 3, from i * 23 // 10 on; the mean of the parts' scores and their plain deviation."""
    p = torch.softmax(2 * torch.randn(23, 5, generator=rng(1), dtype=torch.float64), dim=1).tolist()
    scores = []
    for i in range(10):
        part = p[i * 23 // 10 : (i + 1) * 23 // 10]
        mean = [sum(row[k] for row in part) / len(part) for k in range(5)]
        divergences = [sum(row[k] * (math.log(row[k]) - math.log(mean[k])) for k in range(5)) for row in part]
        scores.append(math.exp(sum(divergences) / len(part)))
    mean_score = sum(scores) / 10
    deviation = math.sqrt(sum((s - mean_score) ** 2 for s in scores) / 10)
    assert score_of_probabilities(torch.tensor(p)) == pytest.approx((mean_score, deviation), rel=1e-6)
    assert {len(p[i * 23 // 10 : (i + 1) * 23 // 10]) for i in range(10)} == {2, 3}


def test_two_parts_of_one_and_two_classes_have_mean_and_deviation_by_hand() -> None:
    p = torch.eye(2)[[0, 0, 0, 1]]
    assert score_of_probabilities(p, 2) == pytest.approx((1.5, 0.5))


def test_sorted_images_score_one_and_shuffled_ones_more() -> None:
    """What the docstring warns of."""
    certain = torch.eye(10).repeat_interleave(50, dim=0)
    assert score_of_probabilities(certain)[0] == pytest.approx(1)
    assert score_of_probabilities(certain[torch.randperm(500, generator=rng())])[0] > 8


def test_fewer_images_score_less() -> None:
    certain = torch.eye(100)[torch.randint(100, (4000,), generator=rng())]
    means = [score_of_probabilities(certain[:n])[0] for n in (100, 400, 4000)]
    assert means[0] <= 10 and means == sorted(means) and means[2] < 100


def test_logits_are_those_of_the_probabilities() -> None:
    logits = 3 * torch.randn(40, 6, generator=rng())
    assert inception_score(logits) == pytest.approx(score_of_probabilities(torch.softmax(logits, dim=1)), rel=1e-5)
    assert inception_score(logits + 1000) == pytest.approx(inception_score(logits), rel=1e-4)
    assert inception_score(torch.eye(4).repeat(10, 1) * 1e4) == pytest.approx((4, 0))  # probabilities that are 0


def test_the_protocol_says_the_parts() -> None:
    assert protocol() == "is-1 splits=10" and protocol(1) == "is-1 splits=1"


def test_what_has_no_score_is_refused() -> None:
    with pytest.raises(ValueError, match="10 part"):
        score_of_probabilities(torch.full((9, 2), 0.5))
    for wrong in ([[0.5, 0.6]], [[1.5, -0.5]], [[math.nan, 1.0]]):
        with pytest.raises(ValueError, match="sum to 1"):
            score_of_probabilities(torch.tensor(wrong), 1)
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(torch.tensor([[math.nan, 0.0]]), 1)
