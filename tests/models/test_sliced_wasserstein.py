"""The sliced Wasserstein distance against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.metrics.sliced_wasserstein import (
    Settings,
    distance,
    laplacian_pyramid,
    patch_distance,
    patch_features,
    random_directions,
    sliced_wasserstein,
)

FAST = Settings(patches_per_image=8, projections=64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(n: int, side: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    coarse = torch.rand(n, channels, 4, 4, generator=rng(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def test_a_shift_on_the_line_is_the_distance() -> None:
    a = torch.randn(500, 1, generator=rng())
    assert sliced_wasserstein(a, a + 3, torch.ones(1, 1)).item() == pytest.approx(3, rel=1e-5)


def test_two_normal_distributions_of_one_mean() -> None:
    """W1(N(0, 1), N(0, s^2)) = |s - 1| E|N(0, 1)|, since both quantile functions are multiples of one another."""
    a, b = torch.randn(200_000, 1, generator=rng(1)), 3 * torch.randn(200_000, 1, generator=rng(2))
    assert sliced_wasserstein(a, b, torch.ones(1, 1)).item() == pytest.approx(2 * math.sqrt(2 / math.pi), rel=0.02)


def test_a_shift_in_space_is_its_length_times_the_mean_cosine() -> None:
    """<t, v> has mean absolute value |t| Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)) over the sphere."""
    d = 10
    a = torch.randn(50, d, generator=rng())
    t = torch.arange(d).float()
    expected = t.norm().item() * math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    value = sliced_wasserstein(a, a + t, random_directions(d, 20_000, rng(1))).item()
    assert value == pytest.approx(expected, rel=0.03)


def test_directions_are_unit_vectors_and_more_of_them_than_fit_at_once_are_all_used() -> None:
    directions = random_directions(7, 130, rng())
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(130))
    a, b = torch.randn(40, 7, generator=rng(1)), torch.randn(40, 7, generator=rng(2))
    one_by_one = [sliced_wasserstein(a, b, directions[:, i : i + 1]).item() for i in range(130)]
    assert sliced_wasserstein(a, b, directions).item() == pytest.approx(sum(one_by_one) / 130, rel=1e-5)


def test_equal_sets_are_at_distance_zero_in_any_order() -> None:
    images = random_images(64)
    assert distance(images, images, FAST)["swd"] == 0
    patches = patch_features(images, FAST, rng())[0]
    shuffled = patches[torch.randperm(len(patches), generator=rng(5))]
    assert patch_distance(patches, shuffled, FAST, rng()) == pytest.approx(0, abs=1e-5)


def test_the_distance_is_zero_only_up_to_sampling_and_grows_with_noise() -> None:
    real, more = random_images(256, seed=1), random_images(256, seed=2)
    values = [distance(real, more, FAST)["swd"]]
    for strength in (20, 60, 120):
        noise = torch.randint(-strength, strength + 1, more.shape, generator=rng(strength))
        values.append(distance(real, (more + noise).clamp(0, 255).to(torch.uint8), FAST)["swd"])
    assert values == sorted(values)
    assert values[0] < 0.1 < values[1]


def test_a_change_of_colour_counts() -> None:
    real, more = random_images(128, seed=1), random_images(128, seed=2)
    assert distance(real, more // 2, FAST)["swd"] > 5 * distance(real, more, FAST)["swd"]


def test_each_pyramid_level_has_its_name_and_swd_is_their_mean() -> None:
    values = distance(random_images(32, 64, seed=1), random_images(32, 64, seed=2), FAST)
    assert list(values) == ["swd", "swd_64", "swd_32", "swd_16"]
    assert values["swd"] == pytest.approx((values["swd_64"] + values["swd_32"] + values["swd_16"]) / 3)


def test_a_shade_is_all_in_the_smallest_level_of_the_pyramid() -> None:
    fine, coarse = laplacian_pyramid(torch.full((1, 2, 32, 32), 0.3), 2)
    torch.testing.assert_close(fine[:, :, 4:-4, 4:-4], torch.zeros(1, 2, 24, 24), atol=1e-6, rtol=0)
    torch.testing.assert_close(coarse, torch.full((1, 2, 16, 16), 0.3))


def test_the_pyramid_of_a_set_is_the_pyramid_of_its_parts() -> None:
    images = random_images(10).float() / 255
    for whole, first, rest in zip(
        laplacian_pyramid(images, 2), laplacian_pyramid(images[:3], 2), laplacian_pyramid(images[3:], 2), strict=True
    ):
        torch.testing.assert_close(whole, torch.cat([first, rest]), atol=1e-6, rtol=0)


def test_patches_are_cut_from_the_image_they_count_for() -> None:
    """Each image has one value: so must each of its patches, image after image."""
    shades = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 16, 16) * 40
    (patches,) = patch_features(shades, Settings(patches_per_image=5), rng())
    assert patches.shape == (30, 3, 7, 7)
    expected = (torch.arange(6) * 40 / 255).repeat_interleave(5)
    torch.testing.assert_close(patches, expected[:, None, None, None].expand_as(patches))


def test_patches_keep_rows_and_columns_apart() -> None:
    ramp = torch.arange(16, dtype=torch.uint8)[None, None, :, None].expand(1, 1, 16, 16).contiguous()
    (patches,) = patch_features(ramp, Settings(patches_per_image=20), rng())
    down = patches[:, :, 1:] - patches[:, :, :-1]
    torch.testing.assert_close(down, torch.full_like(down, 1 / 255))
    assert (patches[:, :, :, 1:] == patches[:, :, :, :-1]).all()


def test_the_same_seed_gives_the_same_number_and_another_seed_another() -> None:
    real, fake = random_images(64, seed=1), random_images(64, seed=2)
    first = distance(real, fake, FAST)
    torch.manual_seed(99)
    assert distance(real, fake, FAST) == first
    assert distance(real, fake, Settings(patches_per_image=8, projections=64, seed=1)) != first


def test_the_protocol_names_all_that_the_number_depends_on() -> None:
    assert Settings().protocol(1024, 32) == "swd-1 levels=32/16 patch=7 per-image=32 projections=256 n=1024 seed=0"
    assert "levels=28 " in Settings().protocol(10, 28)


def test_sets_of_different_size_and_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        distance(random_images(4), random_images(5), FAST)
    with pytest.raises(ValueError, match="7 do not fit"):
        distance(random_images(4, side=4), random_images(4, side=4), FAST)
