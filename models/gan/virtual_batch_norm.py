"""Virtual batch normalisation: Salimans et al., "Improved Techniques for Training GANs", 2016, arXiv 1606.03498,
section 3.5, with the weights of its released code (openai/improved-gan, imagenet/model.py).

    m_i = 1/(n+1) mean[x_i] + n/(n+1) mean[r],   s_i = 1/(n+1) mean[x_i^2] + n/(n+1) mean[r^2]
    y_i = gamma (x_i - m_i) / sqrt(s_i - m_i^2 + eps) + beta

r is a reference batch of n images that never changes and passes the same network beside x; r itself is normalised by
its own moments. So y_i depends on x_i and r, and on no neighbour of x_i. Moments of x_i are over its places, those of r
over its images too. gamma starts as N(1, .02), beta as 0.

Shape legend: x (B, C, H, W), r (n, C, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-5


class VirtualBatchNorm(nn.Module):
    """(x, r) -> both normalised."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        x, r = x.float(), reference.float()  # a difference of squares: half precision would lose it
        mean, square = (moment.mean((0, 2, 3), keepdim=True) for moment in (r, r.square()))
        own_mean, own_square = (moment.mean((2, 3), keepdim=True) for moment in (x, x.square()))
        share = 1 / (len(r) + 1)
        mixed = torch.lerp(mean, own_mean, share), torch.lerp(square, own_square, share)
        return self._normalised(x, *mixed), self._normalised(r, mean, square)

    def _normalised(self, x: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        variance = (square - mean.square()).clamp_min(0)  # it is never negative, but for rounding
        gamma, beta = self.gamma.view(-1, 1, 1), self.beta.view(-1, 1, 1)
        return gamma * (x - mean) * torch.rsqrt(variance + EPS) + beta
