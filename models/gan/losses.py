"""What D and G minimise: one pair of pure functions a game, all of D's logits, in nats or in units of the logit.

    r = D's logits of real images x, f = those of drawn ones G(z); sp = softplus, so that log sigmoid(r) = -sp(-r)

    game            L_D                                  L_G                    source
    non-saturating  E sp(-r) + E sp(f)                   E sp(-f)               Goodfellow et al. 2014, 1406.2661, §3
    saturating      the same                             -E sp(f)               the same, eq. 1: E log(1 - D(G(z)))
    hinge           E max(0, 1 - r) + E max(0, 1 + f)    -E f                   Lim, Ye 2017, 1705.02894
    wasserstein     -E r + E f                           -E f                   Arjovsky et al. 2017, 1701.07875, eq. 2
    relativistic    E sp(-(r - f))                       E sp(-(f - r))         Jolicoeur-Martineau 2018, 1807.00734

`wasserstein` measures a distance only where D's slope is bounded: by a penalty (`penalties.py`) or by spectral
normalisation. `relativistic` (its RpGAN) pairs each real image with one drawn image, in the order in which they come.

One-sided label smoothing (Salimans et al. 2016, 1606.03498, §3.4): real images get the label alpha instead of 1,

    L_D = E alpha sp(-r) + (1 - alpha) sp(r) + E sp(f),   whose best D is   D(x) = alpha p_data / (p_data + p_model).

Drawn images keep the label 0: with a label beta there, beta p_model would stand in the numerator, and where p_data is
next to nothing G would be told to stay.

Feature matching (§3.1) is a loss of G alone: || E f(x) - E f(G(z)) ||^2 of the features f of one layer of D.

Shape legend: logits (B,), features (B, F). Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn import functional as F

Game = Literal["non-saturating", "saturating", "hinge", "wasserstein", "relativistic"]


class Losses(NamedTuple):
    """(real logits, fake logits) -> what is minimised, a scalar."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z)))."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def smoothed_cross_entropy(real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """-E [alpha log D(x) + (1 - alpha) log(1 - D(x))] - E log(1 - D(G(z)))."""
    return cross_entropy(real, fake) + (1 - alpha) * real.float().mean()  # sp(r) = sp(-r) + r


def non_saturating(fake: Tensor) -> Tensor:
    """-E log D(G(z)): a full gradient where D is certain."""
    return F.softplus(-fake.float()).mean()


def saturating(fake: Tensor) -> Tensor:
    """E log(1 - D(G(z))), the minimax game's: no gradient where D is certain."""
    return -F.softplus(fake.float()).mean()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - r) + E max(0, 1 + f): what is on the right side by 1 asks for nothing more."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def critic(real: Tensor, fake: Tensor) -> Tensor:
    """-(E r - E f): the negative of the estimated Wasserstein distance."""
    return fake.float().mean() - real.float().mean()


def raised(fake: Tensor) -> Tensor:
    """-E f."""
    return -fake.float().mean()


def relativistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E sp(-(r - f)): real images shall have higher logits than the drawn ones beside them."""
    return F.softplus(fake.float() - real.float()).mean()


def relativistic_generator(real: Tensor, fake: Tensor) -> Tensor:
    """E sp(-(f - r))."""
    return F.softplus(real.float() - fake.float()).mean()


GAMES: dict[Game, Losses] = {
    "non-saturating": Losses(cross_entropy, lambda real, fake: non_saturating(fake)),
    "saturating": Losses(cross_entropy, lambda real, fake: saturating(fake)),
    "hinge": Losses(hinge, lambda real, fake: raised(fake)),
    "wasserstein": Losses(critic, lambda real, fake: raised(fake)),
    "relativistic": Losses(relativistic_discriminator, relativistic_generator),
}

CLASSIFIES: tuple[Game, ...] = ("non-saturating", "saturating")
"""Games in which sigmoid(logit) is a probability of "real"; only there is a label that can be smoothed."""


def feature_matching(real: Tensor, fake: Tensor) -> Tensor:
    """|| E f(x) - E f(G(z)) ||^2; (B, F) and (B', F). No gradient reaches the real features."""
    return (real.detach().float().mean(0) - fake.float().mean(0)).square().sum()
