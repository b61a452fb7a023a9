"""The games of D and G by hand, and where their optima lie."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.gan.losses import GAMES, Game, feature_matching, relativistic_discriminator, smoothed_cross_entropy

REAL, FAKE = (1.5, -0.25), (0.5, -2.0)


def sp(x: float) -> float:
    return math.log1p(math.exp(x))


def mean(*values: float) -> float:
    return sum(values) / len(values)


BY_HAND: dict[Game, tuple[float, float]] = {
    "non-saturating": (mean(sp(-1.5), sp(0.25)) + mean(sp(0.5), sp(-2)), mean(sp(-0.5), sp(2))),
    "saturating": (mean(sp(-1.5), sp(0.25)) + mean(sp(0.5), sp(-2)), -mean(sp(0.5), sp(-2))),
    "hinge": (mean(0, 1.25) + mean(1.5, 0), 0.75),
    "wasserstein": (mean(0.5, -2) - mean(1.5, -0.25), 0.75),
    "relativistic": (mean(sp(0.5 - 1.5), sp(-2 + 0.25)), mean(sp(1.5 - 0.5), sp(-0.25 + 2))),
}


@pytest.mark.parametrize("game", GAMES)
def test_every_loss_by_hand(game: Game) -> None:
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    of_d, of_g = BY_HAND[game]
    assert GAMES[game].discriminator(real, fake).item() == pytest.approx(of_d, rel=1e-6)
    assert GAMES[game].generator(real, fake).item() == pytest.approx(of_g, rel=1e-6)


@pytest.mark.parametrize("game", GAMES)
def test_g_wants_what_d_does_not(game: Game) -> None:
    """Where D knows nothing, G's gradient of a drawn image's logit points against D's."""
    real, fake = torch.zeros(3), torch.zeros(3, requires_grad=True)
    (of_d,) = torch.autograd.grad(GAMES[game].discriminator(real, fake), fake)
    (of_g,) = torch.autograd.grad(GAMES[game].generator(real, fake), fake)
    assert (of_d > 0).all() and (of_g < 0).all()


def test_a_certain_d_leaves_no_gradient_in_the_saturating_game_and_a_full_one_in_the_other() -> None:
    real, fake = torch.zeros(1), torch.tensor([-40.0], requires_grad=True)
    gradients = [
        torch.autograd.grad(GAMES[game].generator(real, fake), fake)[0].item()
        for game in ("saturating", "non-saturating")
    ]
    assert gradients == pytest.approx([0, -1], abs=1e-6)


def test_pairs_are_those_that_stand_side_by_side() -> None:
    """It is no difference of means: the same logits in another order give another loss, and a shift of all none."""
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    loss = relativistic_discriminator(real, fake)
    assert not torch.isclose(loss, relativistic_discriminator(real, fake.flip(0)))
    torch.testing.assert_close(relativistic_discriminator(real + 7, fake + 7), loss)


def best_logits(p_data: Tensor, p_model: Tensor, alpha: float) -> Tensor:
    """Minimises the smoothed loss on two points by Newton's method, where point i is real with p_data[i] and drawn with
    p_model[i]; a mean over images of an integer number of each stands for the expectation."""
    logits = torch.zeros(len(p_data), dtype=torch.float64, requires_grad=True)
    for _ in range(50):
        real = torch.cat([logits[i].expand(int(p * 100)) for i, p in enumerate(p_data)])
        fake = torch.cat([logits[i].expand(int(p * 100)) for i, p in enumerate(p_model)])
        (gradient,) = torch.autograd.grad(smoothed_cross_entropy(real, fake, alpha), logits, create_graph=True)
        curvature = torch.stack(
            [torch.autograd.grad(g, logits, retain_graph=True)[0][i] for i, g in enumerate(gradient)]
        )
        logits = (logits - gradient / curvature).detach().requires_grad_()
    return logits.detach()


@pytest.mark.parametrize("alpha", [0.9, 0.6])
def test_the_best_d_under_one_sided_smoothing(alpha: float) -> None:
    p_data, p_model = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    expected = alpha * p_data / (p_data + p_model)
    torch.testing.assert_close(best_logits(p_data, p_model, alpha).sigmoid().float(), expected, atol=1e-4, rtol=0)


def test_smoothing_by_nothing_is_no_smoothing() -> None:
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    assert torch.equal(smoothed_cross_entropy(real, fake, 1.0), GAMES["non-saturating"].discriminator(real, fake))


def test_feature_matching_is_the_squared_distance_of_mean_features_and_moves_the_drawn_ones_alone() -> None:
    real = torch.tensor([[1.0, 0.0], [3.0, 2.0]], requires_grad=True)
    fake = torch.tensor([[0.0, 0.0], [0.0, 4.0], [3.0, 2.0]], requires_grad=True)
    loss = feature_matching(real, fake)
    assert loss.item() == pytest.approx((2 - 1) ** 2 + (1 - 2) ** 2)
    loss.backward()
    assert real.grad is None
    torch.testing.assert_close(fake.grad, torch.tensor([[-2.0, 2.0]]).expand(3, 2) / 3)
