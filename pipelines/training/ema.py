"""Averaged weights: an exponential moving average with a half-life in images, as the clock is images seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """`average <- w * average + (1 - w) * parameters` with w = 2^(-images / half_life).

    The half-life grows with the run at first (at most a tenth of the images seen), so that the average forgets the
    initial weights early. Buffers (a BatchNorm's running statistics, counters) are no weights: they are copied, from
    this worker's own networks.
    """

    def __init__(self, networks: Mapping[str, nn.Module], half_life: int) -> None:
        self._networks = networks
        self._half_life = half_life
        self._buffers = {f"{net}.{name}" for net, module in networks.items() for name, _ in module.named_buffers()}
        self.state: dict[str, Tensor] = {name: t.detach().clone() for name, t in _named_tensors(networks)}

    @torch.no_grad()
    def update(self, images: int, images_seen: int) -> None:
        """`images` were in this step, `images_seen` in all steps up to and with it."""
        half_life = min(self._half_life, images_seen / 10)
        weight = 0.5 ** (images / max(half_life, 1e-8))
        for name, tensor in _named_tensors(self._networks):
            if name in self._buffers:
                self.state[name].copy_(tensor)
            else:
                self.state[name].lerp_(tensor, 1 - weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the networks carry the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in _named_tensors(self._networks):
            kept = tensor.clone()
            tensor.copy_(self.state[name])
            self.state[name].copy_(kept)


def _named_tensors(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for net, module in networks.items():
        for name, tensor in module.state_dict().items():
            yield f"{net}.{name}", tensor
