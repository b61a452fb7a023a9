"""The kernel distance against a double loop, closed forms, and an expectation taken over every possible sample."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from models.metrics.kernel import Settings, kernel_distance, squared_mmd


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    """d = 1, x = 0, 1 and y = 1, 2: k(0, 1) = 1, k(1, 2) = 27; crosswise 1, 1, 8, 27, of mean 37/4."""
    value = squared_mmd(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]]))
    assert value.item() == 1 + 27 - 37 / 2


def test_it_is_that_of_a_double_loop() -> None:
    x, y = normal(9, 5), normal(7, 5, seed=1) + 0.3

    def k(a: Tensor, b: Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 5 + 1) ** 3

    same_x = sum(k(x[i], x[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    same_y = sum(k(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    cross = sum(k(a, b) for a in x for b in y) / (9 * 7)
    assert squared_mmd(x, y).item() == pytest.approx(same_x + same_y - 2 * cross, rel=1e-12)


def test_its_mean_over_all_samples_is_the_distance_of_the_distributions() -> None:
    """x is 0 or 1, y is 0, 1 or 2. As k = sum_j C(3, j) x^j y^j, MMD^2 = sum_j C(3, j) (E x^j - E y^j)^2."""
    of_x, of_y = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.0, 1.0, 2.0]).double()
    gaps = [float((of_x**j).mean() - (of_y**j).mean()) for j in (1, 2, 3)]
    expected = sum(binomial * gap**2 for binomial, gap in zip((3, 3, 1), gaps, strict=True))
    for m, n in ((2, 2), (3, 2)):
        samples_x = [torch.tensor(s)[:, None] for s in itertools.product(of_x.tolist(), repeat=m)]
        samples_y = [torch.tensor(s)[:, None] for s in itertools.product(of_y.tolist(), repeat=n)]
        values = [squared_mmd(x, y).item() for x in samples_x for y in samples_y]
        assert sum(values) / len(values) == pytest.approx(expected, rel=1e-12)
        assert min(values) < 0  # an unbiased estimate of something small is


def test_resamples_of_one_distribution_are_at_zero_whatever_their_size() -> None:
    for size in (10, 100):
        values = torch.tensor([squared_mmd(normal(size, 16, 2 * i), normal(size, 16, 2 * i + 1)) for i in range(300)])
        assert abs(values.mean()) < 3 * values.std() / 300**0.5
        assert (values < 0).any()


def test_subsets_are_near_the_whole_and_spread_less_the_larger_they_are() -> None:
    real, fake = normal(2000, 8), normal(2000, 8, seed=1) * 1.2 + 0.1
    whole = squared_mmd(real, fake).item()
    small, large = (kernel_distance(real, fake, Settings(subsets=60, size=size)) for size in (50, 400))
    assert small[0] == pytest.approx(whole, rel=0.25) and large[0] == pytest.approx(whole, rel=0.1)
    assert large[1] < small[1] / 2


def test_mean_and_spread_are_those_of_the_subsets() -> None:
    """At half of four images there are six subsets of each: 36 values, of which all are drawn as often."""
    real, fake = normal(4, 3).float(), normal(4, 3, seed=1).float()
    pairs = list(itertools.combinations(range(4), 2))
    possible = torch.stack([squared_mmd(real[list(a)], fake[list(b)]) for a in pairs for b in pairs])
    value, spread = kernel_distance(real, fake, Settings(subsets=1))
    assert spread == 0 and (possible - value).abs().min() < 1e-12
    value, spread = kernel_distance(real, fake, Settings(subsets=1000))
    assert value == pytest.approx(possible.mean().item(), abs=4 * float(possible.std()) / 1000**0.5)
    assert spread == pytest.approx(possible.std(correction=0).item(), rel=0.1)
    few = kernel_distance(real, fake, Settings(subsets=9))
    assert few == kernel_distance(real, fake, Settings(subsets=9)) != kernel_distance(real, fake, Settings(9, seed=1))


def test_the_protocol_says_which_subsets_there_were() -> None:
    assert Settings().protocol(50_000, 10_000) == "kid-1 subsets=100 of=1000 subsets-seed=0"
    assert Settings(seed=3).protocol(50_000, 1024) == "kid-1 subsets=100 of=512 subsets-seed=3"


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="half of a set at most"):
        kernel_distance(normal(50, 2), normal(3, 2), Settings())
    with pytest.raises(ValueError, match="two images or more"):
        squared_mmd(normal(1, 2), normal(5, 2))
    with pytest.raises(ValueError, match="features are"):
        kernel_distance(normal(8, 2), normal(8, 3), Settings())
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(normal(8, 2), normal(8, 2).log(), Settings())
