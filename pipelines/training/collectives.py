"""What the workers of a run do together. Alone, without a process group, each of these is the identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

T = TypeVar("T")


def alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def gather(value: T) -> list[T]:
    """Every worker's value, in the order of their ranks."""
    if alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The first worker's value."""
    if alone():
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_from_first(networks: Mapping[str, nn.Module]) -> None:
    """All workers start from the first one's weights and buffers."""
    if not alone():
        for network in networks.values():
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, src=0)


def average_gradients(parameters: list[Parameter]) -> None:
    """Every gradient becomes its mean over the workers, in one collective per dtype.

    A parameter without a gradient on some workers counts as zero there (a conditional branch that was not taken), and
    has the mean on all afterwards; without one on every worker it stays without. So all make the same update.
    """
    if alone():
        return
    for dtype in {p.dtype: None for p in parameters}:
        group = [p for p in parameters if p.dtype == dtype]
        # 1 where there is a gradient: a mean above 0 says that some worker has one.
        present = torch.tensor([float(p.grad is not None) for p in group], dtype=dtype, device=group[0].device)
        *means, anywhere = _means([*(torch.zeros_like(p) if p.grad is None else p.grad for p in group), present])
        for p, mean, has_gradient in zip(group, means, (anywhere > 0).tolist(), strict=True):
            if p.grad is not None:
                p.grad.copy_(mean)
            elif has_gradient:
                p.grad = mean.clone()


def _means(tensors: list[Tensor]) -> list[Tensor]:
    """Of tensors of one dtype; all travel together."""
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    return [mean.view_as(t) for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True)]
