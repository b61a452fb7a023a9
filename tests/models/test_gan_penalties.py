"""Penalties on D's slope: against slopes known by hand, and their second derivatives against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.gan.penalties import between, one_centred, squared_slope, zero_centred


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 2, 2, generator=rng(seed), requires_grad=True)


class Linear:
    """D(x) = w . x, with slope w everywhere."""

    def __init__(self) -> None:
        self.w = torch.randn(8, generator=rng(9)).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w


class Quadratic(Linear):
    """D(x) = (w . x)^2 / 2, with slope (w . x) w."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).square() / 2


def test_of_a_linear_d_it_is_the_square_of_its_weights() -> None:
    d, x = Linear(), images()
    penalty = zero_centred(d(x), x, gamma=3.0)
    torch.testing.assert_close(penalty, 1.5 * d.w.square().sum())
    torch.testing.assert_close(torch.autograd.grad(penalty, d.w)[0], 3.0 * d.w)


def test_of_a_quadratic_d_it_is_each_images_own() -> None:
    d, x = Quadratic(), images()
    along = x.flatten(1) @ d.w
    torch.testing.assert_close(squared_slope(d(x), x), along**2 * d.w.square().sum())
    (got,) = torch.autograd.grad(zero_centred(d(x), x, gamma=2.0), d.w)
    # grad_w of mean (w.x)^2 |w|^2
    by_hand = (2 * along[:, None] * x.flatten(1) * d.w.square().sum() + 2 * along[:, None] ** 2 * d.w).mean(0)
    torch.testing.assert_close(got, by_hand, rtol=1e-4, atol=1e-5)


def test_the_second_derivative_is_autograds_of_one_image_after_the_other() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    x, parameters = images(), [*layers.parameters()][:-1]  # the last bias moves no slope

    def alone(*given: Tensor) -> Tensor:
        w, b, v = given
        slopes = [
            torch.autograd.grad((torch.tanh(one.flatten() @ w.T + b) @ v.T).sum(), one, create_graph=True)[0]
            for one in x
        ]
        return torch.stack([slope.square().sum() for slope in slopes]).mean() / 2

    expected = torch.autograd.grad(alone(*parameters), parameters)
    got = torch.autograd.grad(zero_centred(layers(x).squeeze(1), x, gamma=1.0), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_images_between_lie_on_lines_each_at_its_own_place() -> None:
    real, fake = images(400, 1).detach(), images(400, 2).detach()
    found = between(real, fake, rng(3))
    places = ((found - fake) / (real - fake)).flatten(1)
    torch.testing.assert_close(places, places[:, :1].expand_as(places), atol=1e-3, rtol=0)
    own = places[:, 0]
    assert 0 <= own.min() < 0.02 and 0.98 < own.max() <= 1
    assert own.mean().item() == pytest.approx(0.5, abs=0.06)


def test_wgan_gp_wants_a_slope_of_one_on_either_side() -> None:
    real, fake, d = images(4, 1), images(4, 2), Linear()
    for length in (0.25, 1.0, 4.0):
        with torch.no_grad():
            d.w.mul_(length / d.w.norm())
        penalty = one_centred(d, real, fake, 10.0, rng())
        assert penalty.item() == pytest.approx(10 * (length - 1) ** 2, abs=1e-4)
    (gradient,) = torch.autograd.grad(penalty, d.w)
    torch.testing.assert_close(gradient, 20 * (4 - 1) * d.w / 4, rtol=1e-4, atol=1e-4)


def test_wgan_gp_of_a_quadratic_d_is_that_of_the_slopes_in_between() -> None:
    real, fake, d = images(4, 1), images(4, 2), Quadratic()
    x = between(real, fake, rng(5)).detach()
    slopes = (x.flatten(1) @ d.w).abs() * d.w.norm()
    torch.testing.assert_close(one_centred(d, real, fake, 10.0, rng(5)), 10 * (slopes - 1).square().mean())


def test_a_flat_d_has_a_finite_gradient() -> None:
    d = Linear()
    with torch.no_grad():
        d.w.zero_()
    penalty = one_centred(d, images(4, 1), images(4, 2), 10.0, rng())
    assert penalty.item() == pytest.approx(10, rel=1e-4)
    assert torch.autograd.grad(penalty, d.w)[0].isfinite().all()
