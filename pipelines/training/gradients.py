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
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.errors import FigmentError
from pipelines.training.collectives import average_gradients


class NonFiniteError(FigmentError):
    """A loss or gradient is NaN or infinite. The optimiser that met it has not updated anything; another one of the
    same step (a GAN's discriminator's, before the generator's) may have. The last checkpoint is from before it."""


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
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            average_gradients(parameters)
            parameters = [p for p in parameters if p.grad is not None]
            gradients = [p.grad for p in parameters if p.grad is not None]
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
