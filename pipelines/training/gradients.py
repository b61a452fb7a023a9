"""What happens between `backward()` and `optimizer.step()`, for every optimiser of every model.

The gradients are averaged over the workers, checked and clipped in a hook that runs before the optimiser's step, so a
learner writes plain PyTorch and is correct at any world size. `DistributedDataParallel` was not taken: it ties
averaging to forward/backward pairs, and a GAN runs one network several times forward, or backward through a network
that must not collect gradients; the price is that communication starts after the backward pass, not during it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.errors import FigmentError


class NonFiniteError(FigmentError):
    """A loss or gradient is NaN or infinite: nothing was updated in this step."""


def average_over_workers(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the workers, in one collective per dtype; all workers end bit-equal."""
    world_size = dist.get_world_size()
    for dtype in {t.dtype: None for t in tensors}:
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        flat /= world_size
        for t, mean in zip(group, flat.split([t.numel() for t in group]), strict=True):
            t.copy_(mean.view_as(t))


def broadcast_from_first(networks: Mapping[str, nn.Module]) -> None:
    """All workers start from the first one's weights and buffers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for network in networks.values():
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, src=0)


def guard_optimizers(
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    *,
    grad_clip: float | None,
    where: Callable[[], str],
) -> None:
    """Attach averaging, the finite check and clipping to every optimiser. `where()` names the step for the message."""
    names = {p: f"{net}.{name}" for net, module in networks.items() for name, p in module.named_parameters()}

    def attach(optimizer_name: str, optimizer: Optimizer) -> None:
        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters if p.grad is not None]
            if dist.is_initialized() and dist.get_world_size() > 1:
                average_over_workers(gradients)
            norm = nn.utils.get_total_norm(gradients)
            if not torch.isfinite(norm):
                raise _non_finite([(names[p], p.grad) for p in parameters], optimizer_name, where())
            if grad_clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)

        optimizer.register_step_pre_hook(before_step)

    for optimizer_name, optimizer in optimizers.items():
        attach(optimizer_name, optimizer)


def _non_finite(named: list[tuple[str, Tensor | None]], optimizer_name: str, where: str) -> NonFiniteError:
    bad = [(name, g) for name, g in named if g is not None and not torch.isfinite(g).all()]
    if not bad:  # every entry is finite, their sum of squares is not
        return NonFiniteError(
            f"{where}: the gradient norm of optimiser {optimizer_name!r} overflowed before its update;"
            " lower the learning rate or set --training.grad-clip; the last checkpoint is from before this step"
        )
    name, gradient = bad[0]
    kind = "NaN" if torch.isnan(gradient).any() else "infinite"
    others = f" and of {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    return NonFiniteError(
        f"{where}: the gradient of {name}{others} is {kind} before the update of optimiser {optimizer_name!r};"
        " lower the learning rate or set --training.grad-clip; the last checkpoint is from before this step"
    )
