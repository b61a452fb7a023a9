"""The diversity index against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from models.metrics.diversity import diversity_index, mean_pairwise_distance, pixel_features


def test_mean_over_pairs_by_hand() -> None:
    """A right triangle of sides 3, 4, 5."""
    assert mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])) == pytest.approx(4)


def test_normal_points_are_root_two_sigma_chi_apart() -> None:
    d = 64
    points = 2 * torch.randn(1000, d, generator=torch.Generator().manual_seed(0))
    chi = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    assert mean_pairwise_distance(points) == pytest.approx(2 * math.sqrt(2) * chi, rel=0.01)


def test_a_collapsed_generator_has_none_and_the_data_itself_all() -> None:
    real = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    assert diversity_index(real[:1].repeat(50, 1), real) == 0
    assert diversity_index(real, real) == pytest.approx(1)
    assert diversity_index(real / 2 + 7, real) == pytest.approx(0.5, rel=1e-5)


def test_two_modes_out_of_many() -> None:
    """Half the samples at 0, half at 1 of a line: (n/2)^2 of the n (n-1) / 2 pairs are 1 apart, the others 0."""
    samples = torch.tensor([0.0, 1.0]).repeat(50)[:, None]
    assert mean_pairwise_distance(samples) == pytest.approx(2500 / 4950)


def test_small_differences_are_not_lost_beside_large_values() -> None:
    points = torch.tensor([[1000.0, 0.0], [1000.0, 0.001]])
    assert mean_pairwise_distance(points) == pytest.approx(0.001, rel=1e-4)


def test_pixels_are_scaled_to_one() -> None:
    features = pixel_features(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2))
    assert torch.equal(features, torch.tensor([[0.0, 1.0]]))


def test_one_image_and_a_data_set_without_differences_have_no_index() -> None:
    with pytest.raises(ValueError, match="two images"):
        mean_pairwise_distance(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="all alike"):
        diversity_index(torch.rand(4, 3), torch.ones(4, 3))
