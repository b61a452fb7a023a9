"""What bounds the slope of D: penalties on the gradient of its logit with respect to an image.

    R1 = gamma/2 E | grad_x D(x) |^2          at real images x                 Mescheder et al. 2018, 1801.04406, eq. 9
    R2 = gamma/2 E | grad_x D(G(z)) |^2       at drawn images                  the same, eq. 10
    GP = lambda E ( | grad_x D(x^) | - 1 )^2  at x^ = e x + (1 - e) G(z),      Gulrajani et al. 2017, 1704.00028, eq. 3
                                              e ~ U(0, 1) an image

The gradient of a penalty with respect to D's weights is a second derivative of D. Two things follow:
- D(x_i) must depend on x_i alone: of a D with batch norm or minibatch features, grad_{x_i} sum_j D(x_j) is no gradient
  of D at x_i. Who builds a D checks that.
- D must be called uncompiled (`network.forward`, not `network()`): compiled graphs have one derivative only.

Shape legend: x (B, C, H, W), logits and norms (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor

Penalty = Literal["none", "r1", "r2", "r1+r2", "wgan-gp"]


def squared_slope(logits: Tensor, images: Tensor) -> Tensor:
    """| grad_x D(x) |^2 of each image, (B,), itself differentiable; `images` require a gradient and made `logits`."""
    (gradient,) = torch.autograd.grad(logits.float().sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)


def zero_centred(logits: Tensor, images: Tensor, gamma: float) -> Tensor:
    """gamma/2 E | grad D |^2: R1 at real images, R2 at drawn ones."""
    return gamma / 2 * squared_slope(logits, images).mean()


def between(real: Tensor, fake: Tensor, generator: Generator) -> Tensor:
    """x^ on the lines between real and drawn images, each at a place of its own; requires a gradient."""
    places = torch.rand(len(real), 1, 1, 1, generator=generator, device=real.device)
    return torch.lerp(fake, real, places).detach().requires_grad_()


def one_centred(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, weight: float, generator: Generator
) -> Tensor:
    """lambda E ( | grad D(x^) | - 1 )^2."""
    images = between(real, fake, generator)
    slope = (squared_slope(discriminator(images), images) + 1e-12).sqrt()  # finite derivative where D is flat
    return weight * (slope - 1).square().mean()
