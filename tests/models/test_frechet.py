"""The Fréchet distance against closed forms and SciPy; moments against one pass over everything."""

from __future__ import annotations

import random

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from models.metrics.frechet import (
    Moments,
    frechet_distance,
    gaussian_distance,
    merged,
    moments,
    moments_from_tensors,
    trace_of_root,
)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(n: int, d: int, seed: int) -> Tensor:
    """Features that are correlated, of scales from 1 to 1/d."""
    return normal(n, d, seed) @ normal(d, d, seed + 100) / torch.arange(1, d + 1) + normal(1, d, seed + 200)


def test_moments_of_three_points_by_hand() -> None:
    """(0, 0), (3, 0), (0, 3) have the mean (1, 1); deviations (-1, -1), (2, -1), (-1, 2)."""
    found = moments(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]))
    assert found.count == 3 and found.mean.tolist() == [1, 1]
    assert found.scatter.tolist() == [[6, -3], [-3, 6]] and found.covariance().tolist() == [[3, -1.5], [-1.5, 3]]


def test_seven_uneven_shares_in_any_order_and_batch_are_one_worker() -> None:
    features = (skewed(800, 16, seed=1) + 50).float()
    other = moments(skewed(300, 16, seed=2) + 50)
    whole = moments(features)
    distance = frechet_distance(whole, other)
    drawn = random.Random(0)
    for _ in range(5):
        cuts = sorted(drawn.sample(range(1, 800), 6))
        shares = torch.tensor_split(features, cuts)
        workers = [merged(moments(batch) for batch in share.split(drawn.randint(20, 300))) for share in shares]
        drawn.shuffle(workers)
        parts = merged(workers)
        assert parts.count == 800
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.scatter, whole.scatter, rtol=1e-12, atol=1e-9)
        assert frechet_distance(parts, other) == pytest.approx(distance, rel=1e-10)


def test_merging_in_pairs_and_in_a_row_agree_to_rounding() -> None:
    a, b, c = (moments(skewed(n, 5, seed)) for seed, n in enumerate((3, 40, 7)))
    torch.testing.assert_close(((a + b) + c).scatter, (a + (b + c)).scatter, rtol=1e-13, atol=1e-13)


def test_a_large_mean_costs_no_digits() -> None:
    """At 10^6 standard deviations sums of squares in float64 keep four digits of a variance, these keep ten."""
    x = normal(400, 3)
    found = merged(moments(part + 1e6) for part in x.split(13))
    torch.testing.assert_close(found.covariance(), torch.cov(x.T), rtol=1e-9, atol=1e-9)


def test_a_worker_without_images_changes_nothing() -> None:
    some, none = moments(normal(9, 4)), moments(torch.empty(0, 4))
    for both in (some + none, none + some):
        assert both.count == 9 and torch.equal(both.scatter, some.scatter)
    assert (none + none).count == 0


def test_moments_come_back_from_tensors() -> None:
    found = moments(normal(9, 4).float())
    again = moments_from_tensors({name: tensor.clone() for name, tensor in found.tensors().items()})
    assert again.count == 9 and torch.equal(again.mean, found.mean) and torch.equal(again.scatter, found.scatter)
    with pytest.raises(ValueError, match="lack mean"):
        moments_from_tensors({"count": torch.tensor(3), "scatter": found.scatter})
    with pytest.raises(ValueError, match="have shapes"):
        moments_from_tensors({**found.tensors(), "scatter": found.scatter[:2]})


def test_normals_on_the_line() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2."""
    value = gaussian_distance(*(torch.tensor(x, dtype=torch.float64) for x in ([1.0], [[4.0]], [4.0], [[25.0]])))
    assert value == pytest.approx(9 + 9)


def test_covariances_of_one_basis_differ_by_their_roots() -> None:
    """sum (sqrt(a_i) - sqrt(b_i))^2 in whatever basis."""
    basis = torch.linalg.qr(normal(6, 6)).Q
    a, b = torch.tensor([9.0, 4, 1, 1, 0, 0]).double(), torch.tensor([1.0, 4, 0, 9, 16, 0]).double()
    zero = torch.zeros(6, dtype=torch.float64)
    value = gaussian_distance(zero, basis * a @ basis.T, zero, basis * b @ basis.T)
    assert value == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-12)


def test_two_by_two_in_closed_form() -> None:
    """tr of the root of a 2 x 2 matrix P of positive eigenvalues is sqrt(tr P + 2 sqrt(det P))."""
    s1, s2 = torch.tensor([[2.0, 1], [1, 3]]).double(), torch.tensor([[5.0, -2], [-2, 1]]).double()
    product = s1 @ s2
    expected = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    assert trace_of_root(s1, s2).item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("d", [3, 40])
def test_the_root_is_that_of_scipy(d: int) -> None:
    a, b = moments(skewed(300, d, seed=3)), moments(skewed(200, d, seed=4))
    s1, s2 = a.covariance().numpy(), b.covariance().numpy()
    root = scipy.linalg.sqrtm(s1 @ s2)
    apart = (a.mean - b.mean).numpy()
    expected = apart @ apart + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_fewer_images_than_features() -> None:
    """Rank 4 of 60: a set against itself, against its own turn into dimensions of no overlap, and scaled."""
    x = torch.cat([skewed(5, 30, seed=5), torch.zeros(5, 30)], dim=1)
    here, there = moments(x), moments(x.roll(30, dims=1))
    total = float(here.covariance().trace())
    assert frechet_distance(here, here) == pytest.approx(0, abs=1e-12 * total)
    apart = float((here.mean - there.mean).square().sum())
    assert frechet_distance(here, there) == pytest.approx(apart + 2 * total, rel=1e-12)  # nothing in common
    assert frechet_distance(here, moments(3 * x)) == pytest.approx(
        4 * total + 4 * float(here.mean.square().sum()), rel=1e-12
    )


def test_constant_features_are_a_point() -> None:
    point, spread = moments(torch.full((4, 3), 2.0)), moments(normal(50, 3))
    expected = float((spread.mean - 2).square().sum() + spread.covariance().trace())
    assert frechet_distance(point, spread) == pytest.approx(expected)
    assert frechet_distance(point, point) == 0


def test_the_bias_is_the_one_that_is_said() -> None:
    """d (d + 5) / 2N for two white sets of N: 0.052 at d = 8, N = 1,000; and half of it at twice N."""
    means = []
    for n in (1000, 2000):
        pairs = [frechet_distance(moments(normal(n, 8, 2 * i)), moments(normal(n, 8, 2 * i + 1))) for i in range(60)]
        means.append(sum(pairs) / len(pairs))
    assert means == [pytest.approx(0.052, rel=0.08), pytest.approx(0.026, rel=0.08)]


def test_the_bias_of_uneven_eigenvalues() -> None:
    values = 1 / torch.arange(1, 13).double()
    pairwise = torch.outer(values, values) / (values[:, None] + values)
    expected = float(2 * values.sum() + pairwise.sum() + pairwise.trace()) / 500
    pairs = [
        frechet_distance(*(moments(normal(500, 12, seed) * values.sqrt()) for seed in (2 * i, 2 * i + 1)))
        for i in range(200)
    ]
    assert sum(pairs) / len(pairs) == pytest.approx(expected, rel=0.06)


def test_what_has_no_distance_is_refused() -> None:
    two = moments(normal(2, 3))
    for few in (moments(normal(1, 3)), moments(torch.empty(0, 3))):
        with pytest.raises(ValueError, match="two images or more"):
            frechet_distance(two, few)
    with pytest.raises(ValueError, match="not of one network"):
        frechet_distance(two, moments(normal(5, 4)))
    with pytest.raises(ValueError, match="not of one network"):
        _ = two + moments(normal(5, 4))
    with pytest.raises(ValueError, match="not finite"):
        moments(torch.tensor([[1.0, float("nan")], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="features are"):
        moments(torch.zeros(3))
    with pytest.raises(ValueError, match="no moments"):
        merged(iter(list[Moments]()))
