"""Steps of a recipe's model at its full width, by hand: `python -m benchmarks.full_width improved-gan-imagenet128`.

Tests train models of a few hundred parameters. This builds the recipe's own, and takes `--steps` real steps on noise of
the shape and the labels that it asks for, with one worker's share of a batch. It ends with code 1 where a metric or a
weight is not finite, or a weight matrix has not moved, and prints seconds a step and the most memory last.

Noise says nothing of how well it learns. `--side` and `--channels` are the data set's, where it is no ImageNet of 128.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro

import models
from models.contract import Asks, Batch, ImageShape, InitialisesFromData
from pipelines.errors import FigmentError
from pipelines.recipes import RECIPES


@dataclass(frozen=True)
class Settings:
    """Take steps of a recipe's model as it is."""

    recipe: Annotated[str, tyro.conf.Positional]
    """Whose model, and whose batch: a worker's share of it."""
    steps: int = 2
    """How many."""
    side: int = 128
    """Height and width of an image."""
    channels: int = 3
    """Channels of an image."""
    threads: int = 1
    """Of torch, on a CPU."""


def measure(settings: Settings) -> dict[str, Any]:
    """`FigmentError` where a step leaves something that is not finite, or a weight matrix where it was."""
    if settings.recipe not in RECIPES:
        raise FigmentError(f"there is no recipe {settings.recipe!r}; known: {', '.join(RECIPES)}")
    spec = RECIPES[settings.recipe]()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(spec.training.seed)
    shape = ImageShape(settings.channels, settings.side, settings.side)
    learner = models.build(spec.model, shape)
    for network in learner.networks().values():
        network.to(device)
    weights = {
        f"{name}.{key}": parameter
        for name, network in learner.networks().items()
        for key, parameter in network.named_parameters()
        if parameter.dim() > 1
    }
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    share = spec.training.batch_size // spec.cluster.workers
    classes = learner.needs().classes if isinstance(learner, Asks) else 0
    generator = torch.Generator(device).manual_seed(0)
    seconds: list[float] = []
    metrics: dict[str, float] = {}
    for step in range(settings.steps):
        size = (share, settings.channels, settings.side, settings.side)
        images = torch.randint(0, 256, size, generator=generator, device=device, dtype=torch.uint8)
        labels = torch.randint(0, max(1, classes), (share,), generator=generator, device=device)
        batch = Batch(images, labels, share * step)
        started = time.perf_counter()
        if step == 0 and isinstance(learner, InitialisesFromData):
            learner.initialise(batch, generator)
        metrics = {name: value.item() for name, value in learner.step(batch, generator).items()}
        seconds.append(time.perf_counter() - started)
        print(f"  step {step + 1}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)
    wrong = [name for name, value in metrics.items() if not abs(value) < float("inf")]
    wrong += [name for name, weight in weights.items() if not weight.isfinite().all()]
    wrong += [name for name, weight in weights.items() if torch.equal(weight, before[name])]
    if wrong:
        raise FigmentError(f"after {settings.steps} steps these are not finite, or where they were: {', '.join(wrong)}")
    return {
        "recipe": settings.recipe,
        "device": device.type,
        "images_a_step": share,
        "parameters": sum(p.numel() for network in learner.networks().values() for p in network.parameters()),
        "seconds_a_step": [round(value, 2) for value in seconds],
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
        **metrics,
    }


if __name__ == "__main__":
    chosen = tyro.cli(Settings, prog="python -m benchmarks.full_width")
    try:
        print(json.dumps({"benchmark": "full_width", **measure(chosen)}))
    except FigmentError as error:
        sys.exit(f"error: {error}")
