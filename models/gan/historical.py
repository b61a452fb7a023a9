"""Historical averaging: Salimans et al., "Improved Techniques for Training GANs", 2016, arXiv 1606.03498, §3.3.

    L <- L + w || theta - (1/t) sum_{i <= t} theta_i ||^2        theta_i: the weights at update i of this network

added to the loss of either player, so that it does not run round in circles: the mean of a circle is its centre, and
the term pulls there. The mean is a constant to the gradient, 2 w (theta - mean). The released code has none of it; its
weight w is ours.

A network of its own, all buffers: what a checkpoint must bring back is a weight or a buffer. It is the same on every
worker, since the weights are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HistoricalAverage(nn.Module):
    """The running mean of the weights of one network."""

    updates: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        for name, parameter in network.named_parameters():
            self.register_buffer(_buffer(name), parameter.detach().clone())

    @torch.no_grad()
    def add(self, network: nn.Module) -> None:
        """Takes the weights as they are now into the mean: once an update, before it."""
        self.updates += 1
        for name, parameter in network.named_parameters():
            self.get_buffer(_buffer(name)).lerp_(parameter, 1 / self.updates)

    def distance(self, network: nn.Module) -> Tensor:
        """|| theta - mean ||^2 over all weights, a scalar."""
        squares = [
            (parameter - self.get_buffer(_buffer(name))).square().sum()
            for name, parameter in network.named_parameters()
        ]
        return torch.stack(squares).sum()


def _buffer(name: str) -> str:
    """A buffer's name has no dots."""
    return "mean_of_" + name.replace(".", "/")
