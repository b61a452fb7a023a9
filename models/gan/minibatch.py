"""Minibatch discrimination: Salimans et al., "Improved Techniques for Training GANs", 2016, arXiv 1606.03498, §3.2.

    M_i = f(x_i) T                                        T in R^{A x B x C}: a matrix M_i in R^{B x C} an image
    c_b(x_i, x_j) = exp( -| M_{i,b} - M_{j,b} |_1 )       in (0, 1]: how close two images are, by row b
    o(x_i)_b = sum_{j != i} c_b(x_i, x_j)                 how many images of the batch are close to x_i

D gets f(x_i) and o(x_i) side by side, so that it sees when drawn images are all alike, and G learns to draw different
ones. Real and drawn images come in batches of their own. The paper's sum has j = i in it, which adds 1 to every
feature; as in the released code it is left out, so that an image alone has features of 0.

The batch is one worker's share: images on other workers are not seen, and features grow with the share (they are sums).
So the share, not the global batch, is part of a setting. D(x_i) depends on the whole batch: no penalty per image.

Shape legend: f (N, A), M (N, B, C), o (N, B); N is the batch here, since the paper's B are the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MinibatchDiscrimination(nn.Module):
    """f (N, A) -> (N, A + B): the features, and how close the others of the batch are."""

    def __init__(self, features: int, kernels: int, dimensions: int) -> None:
        super().__init__()
        self.kernels = kernels
        self.t = nn.Linear(features, kernels * dimensions, bias=False)

    def forward(self, f: Tensor) -> Tensor:
        m = self.t(f).unflatten(1, (self.kernels, -1))
        return torch.cat([f, closeness(m).to(f.dtype)], dim=1)


def closeness(m: Tensor) -> Tensor:
    """M (N, B, C) -> o (N, B)."""
    m = m.float()
    distances = (m[:, None] - m[None, :]).abs().sum(3)  # (N, N, B)
    others = 1 - torch.eye(len(m), device=m.device)
    return (torch.exp(-distances) * others[:, :, None]).sum(1)
