"""Precision, recall, density and coverage against hand cases, discs, loops and what they are on average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.metrics.manifold import Settings, measure, neighbour_distances

ONE = Settings(k_precision=1, k_density=1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=rng(seed))


def line(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float32)[:, None]


def disc(n: int, x: float, seed: int) -> Tensor:
    """n points, evenly spread over the disc of radius 1 around (x, 0)."""
    radius, angle = torch.rand(n, generator=rng(seed)).sqrt(), 2 * math.pi * torch.rand(n, generator=rng(seed + 99))
    return torch.stack([x + radius * angle.cos(), radius * angle.sin()], dim=1)


def test_neighbours_on_a_line() -> None:
    first, third = neighbour_distances(line(0, 1, 3, 7), (1, 3))
    assert first.tolist() == [1, 1, 2, 4] and third.tolist() == [7, 6, 4, 7]


def test_equal_points_are_neighbours_at_zero() -> None:
    first, second = neighbour_distances(line(1000.1, 1000.1, 1000.1, 5), (1, 3))
    assert first[:3].tolist() == [0, 0, 0] and first[3] > 0 and second[0] == first[3]


def test_figures_of_a_line_by_hand() -> None:
    """k = 1. Real 0, 1, 10 have the balls [-1, 1], [0, 2], [1, 19]; fake 0.5, 30 have [-29, 30], [0.5, 59.5].

    0.5 is in two real balls, 30 in none: precision 1/2, density 2/2. Real 0, 1, 10: all in the first fake ball.
    The balls of 0 and 1 hold a fake, that of 10 none."""
    found = measure(line(0, 1, 10), line(0.5, 30), ONE)
    assert found == pytest.approx({"precision": 1 / 2, "recall": 1, "density": 1, "coverage": 2 / 3})


def test_an_outlier_of_the_real_images_deceives_precision_and_not_density() -> None:
    """Real 0, 1, 100 have balls of 1, 1, 99; fakes at 40, 41, 42, 43 lie in that of 100 alone."""
    found = measure(line(0, 1, 100), line(40, 41, 42, 43), ONE)
    assert found["precision"] == 1 and found["density"] == 1 and found["coverage"] == pytest.approx(1 / 3)
    more = measure(line(0, 1, 2, 3, 100), line(40, 41, 42, 43), Settings(1, 3))
    assert more["precision"] == 1 and more["density"] == pytest.approx(1 / 3) and more["coverage"] == 1 / 5


def test_a_border_belongs_to_precision_and_not_to_density() -> None:
    """Real 0, 2: both balls end where the fake 4 is, or do not; k = 1."""
    found = measure(line(0, 2), line(4, 4), ONE)
    assert found["precision"] == 1 and found["density"] == 0 and found["coverage"] == 0
    assert found["recall"] == 0  # fakes that are equal have balls of radius 0
    assert measure(line(0, 4), line(4, 4), ONE)["recall"] == 1 / 2  # which hold what is equal to them


def test_a_set_against_itself() -> None:
    x = normal(200, 6)
    assert measure(x, x, Settings()) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}


def test_far_sets_have_nothing_in_common() -> None:
    real, fake = normal(50, 4), normal(60, 4, seed=1) + 1000
    assert measure(real, fake, Settings()) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_a_collapsed_generator_is_precise_and_covers_nothing() -> None:
    real = normal(500, 2)
    found = measure(real, real[:1].repeat(400, 1), Settings())
    assert found["precision"] == 1 and found["recall"] == 1 / 500 and found["coverage"] < 0.05


def test_two_discs_share_a_lens() -> None:
    """Of discs of radius 1 whose centres are 1 apart the lens is 2 pi / 3 - sqrt(3) / 2 of pi: 0.391."""
    lens = (2 * math.pi / 3 - math.sqrt(3) / 2) / math.pi
    found = measure(disc(1500, 0, seed=1), disc(1500, 1, seed=2), Settings())
    assert found["precision"] == pytest.approx(lens, abs=0.05)  # balls reach over the rim
    assert found["recall"] == pytest.approx(lens, abs=0.05)
    assert found["density"] == pytest.approx(lens, abs=0.05)
    assert found["coverage"] == pytest.approx(lens, abs=0.05)


@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 150)])
def test_equal_distributions_have_density_one_and_the_coverage_that_is_said(n: int, m: int) -> None:
    k, repeats = 5, 150
    found = [measure(normal(n, 3, 2 * i), normal(m, 3, 2 * i + 1), Settings()) for i in range(repeats)]
    expected = 1 - math.prod((n - 1 - i) / (n - 1 + m - i) for i in range(k))
    assert sum(f["density"] for f in found) / repeats == pytest.approx(1, abs=0.03)
    assert sum(f["coverage"] for f in found) / repeats == pytest.approx(expected, abs=0.01)


def test_it_is_that_of_the_whole_matrices() -> None:
    real, fake = normal(70, 5).double(), normal(50, 5, seed=1).double() * 0.8 + 0.3

    def radii(points: Tensor, k: int) -> Tensor:
        return torch.stack([torch.stack([(p - q).norm() for q in points]).sort().values[k] for p in points])

    apart = torch.stack([torch.stack([(y - x).norm() for x in real]) for y in fake])  # (M, N)
    wide = apart < radii(real, 5)
    expected = {
        "precision": (apart <= radii(real, 3)).any(dim=1).double().mean().item(),
        "recall": (apart <= radii(fake, 3)[:, None]).any(dim=0).double().mean().item(),
        "density": wide.double().sum(dim=1).mean().item() / 5,
        "coverage": wide.any(dim=0).double().mean().item(),
    }
    assert all(value > 0.1 for value in expected.values())
    assert measure(real, fake, Settings()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_depends_on_the_blocks(dtype: torch.dtype) -> None:
    """Also where many features are equal and at 1,000 standard deviations, where another order of sums would show."""
    real = (normal(90, 20) + 1000).to(dtype)
    fake = torch.cat([real[::3], (normal(40, 20, seed=1) + 1000).to(dtype), real[:5], real[:5]])
    whole = measure(real, fake, Settings())
    radii = neighbour_distances(real, (3,))
    for pairs in (1, 97, 1000, 5000):
        assert measure(real, fake, Settings(), pairs) == whole
        assert torch.equal(neighbour_distances(real, (3,), pairs)[0], radii[0])


def test_no_block_is_larger_than_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = torch.cdist

    def counted(a: Tensor, b: Tensor, compute_mode: str) -> Tensor:
        sizes.append(len(a) * len(b))
        return plain(a, b, compute_mode=compute_mode)

    monkeypatch.setattr(torch, "cdist", counted)
    measure(normal(80, 3), normal(100, 3), Settings(), pairs_at_once=500)
    assert max(sizes) <= 500 and sum(sizes) == 80 * 80 + 100 * 100 + 80 * 100


def test_the_protocol_says_both_k() -> None:
    assert Settings().protocol() == "manifold-1 precision-k=3 density-k=5"


def test_what_has_no_figures_is_refused() -> None:
    for real, fake in ((normal(5, 2), normal(50, 2)), (normal(50, 2), normal(3, 2))):
        with pytest.raises(ValueError, match="nearest neighbours"):
            measure(real, fake, Settings())
    with pytest.raises(ValueError, match="nearest neighbours"):
        measure(normal(9, 2), normal(9, 2), Settings(k_precision=0))
    with pytest.raises(ValueError, match="features are"):
        measure(normal(9, 2), normal(9, 3), Settings())
    with pytest.raises(ValueError, match="not finite"):
        measure(normal(9, 2), normal(9, 2).log(), Settings())
