"""What the pipeline costs: images/s of a whole training run with one worker ÷ a bare PyTorch loop of the same DCGAN.

    python -m benchmarks.train_overhead [--dataset cifar10] [--images 30000] [--repetitions 3]

The run streams shards from the storage, checks and clips nothing less than any run, draws its pictures, writes its
checkpoints and tracks to MLflow when MLFLOW_TRACKING_URI is set. The bare loop calls the same `learner.step` on tensors
that are already in memory, in a process of its own with the same number of threads. A training worker keeps freed
memory (`pipelines/training/allocator.py`), which a plain PyTorch process does not: a second bare loop that does so as
well tells what the pipeline costs beside that gain. All take turns, so that whatever else the machine does meets all;
the last line is one JSON object. Needs a running cluster and an ingested data set.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro

import models
from infra.storage import default_store, open_storage
from jobs.entry import connect_ray, run_job
from models.contract import Batch, ImageShape
from pipelines.config import ClusterSpec, RunSpec
from pipelines.errors import FigmentError
from pipelines.recipes import RECIPES
from pipelines.training.allocator import keep_freed_memory

THREADS = 1


@dataclass(frozen=True)
class Arguments:
    dataset: str = "cifar10"
    """Ingested data set."""
    recipe: str = "dcgan-demo"
    """Whose model and batch size are measured; without the average of weights, which a bare loop has not."""
    images: int = 30_000
    """Images of one repetition."""
    repetitions: int = 3
    """Of a run and the two bare loops."""
    bare: Literal["plain", "kept"] | None = None
    """Only one bare loop, "kept" with freed memory kept: what the benchmark calls in a process of its own."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.train_overhead", description=__doc__)
    spec = _spec(arguments)
    if arguments.bare:
        if arguments.bare == "kept":
            keep_freed_memory()
        print(json.dumps({"images_per_s": bare_loop(spec, arguments.images)}))
        return
    found: list[tuple[float, float, float]] = []
    for i in range(arguments.repetitions):
        plain = _bare_in_a_process(arguments, "plain")
        whole = _whole_run(spec)
        kept = _bare_in_a_process(arguments, "kept")
        found.append((whole, plain, kept))
        print(
            f"{i + 1}/{arguments.repetitions}: run {whole:,.0f} images/s, bare loop {plain:,.0f}: {whole / plain:.3f};"
            f" with freed memory kept {kept:,.0f}: {whole / kept:.3f}",
            flush=True,
        )
    result = {
        "benchmark": "train_overhead",
        "ratio_vs_bare_loop": round(statistics.median(whole / plain for whole, plain, _ in found), 4),
        "ratio_vs_bare_loop_that_keeps_memory": round(statistics.median(whole / kept for whole, _, kept in found), 4),
        "images_per_s": [dict(zip(("run", "bare", "bare_kept"), map(round, row), strict=True)) for row in found],
        "recipe": arguments.recipe,
        "dataset": arguments.dataset,
        "images": arguments.images,
        "batch_size": spec.training.batch_size,
        "threads": THREADS,
        "cores": os.cpu_count(),
        "tracked": "MLFLOW_TRACKING_URI" in os.environ,
    }
    print(json.dumps(result))


def _spec(arguments: Arguments) -> RunSpec:
    if arguments.recipe not in RECIPES:
        raise FigmentError(f"there is no recipe {arguments.recipe!r}; known: {', '.join(RECIPES)}")
    spec = RECIPES[arguments.recipe]()
    training = replace(
        spec.training,
        images=arguments.images,
        ema_half_life=0,
        log_every=max(1, arguments.images // 20),
        checkpoint_every=max(1, arguments.images // 2),
    )
    return replace(
        spec,
        recipe="train-overhead",  # the recipe's own registered model stays as it is
        data=replace(spec.data, dataset=arguments.dataset),
        training=training,
        visuals=replace(spec.visuals, frames=5),
        cluster=ClusterSpec(workers=1, threads_per_worker=THREADS),
    )


def _whole_run(spec: RunSpec) -> float:
    from pipelines.tracking import Tracking
    from pipelines.training.trainer import launch

    store = default_store()
    if store is None:
        raise FigmentError("no storage is named: set FIGMENT_STORE, or run inside `python -m infra.local run --`")
    connect_ray()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    outcome = launch(
        spec,
        open_storage(store),
        name=f"overhead-{uuid.uuid4().hex[:8]}",
        tracking=Tracking(uri, "benchmarks") if uri else None,
        tags={},
        say=lambda line: None,
    )
    return outcome.images_per_s


def _bare_in_a_process(arguments: Arguments, kind: str) -> float:
    command = [sys.executable, "-m", "benchmarks.train_overhead", "--bare", kind, "--recipe", arguments.recipe]
    done = subprocess.run([*command, "--images", str(arguments.images)], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["images_per_s"])


def bare_loop(spec: RunSpec, images: int) -> float:
    """Images/s of `learner.step` on random CIFAR-shaped tensors in memory; steps cost the same whatever the pixels."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(spec.training.seed)
    learner = models.build(spec.model, ImageShape(3, 32, 32))
    size = spec.training.batch_size
    data = torch.randint(0, 256, (4_096, 3, 32, 32), dtype=torch.uint8)
    labels = torch.zeros(size, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    seen = 0
    while seen < images:
        start = seen % (len(data) - size)
        learner.step(Batch(data[start : start + size], labels, seen), generator)
        seen += size
    return seen / (time.perf_counter() - started)


if __name__ == "__main__":
    run_job(main)
