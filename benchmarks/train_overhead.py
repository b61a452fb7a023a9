"""What the pipeline costs: images/s of a whole training run ÷ bare PyTorch loops of the same DCGAN.

    python -m benchmarks.train_overhead [--dataset cifar10] [--images 30000] [--repetitions 3] [--workers 2]

The run streams shards from the storage, checks and clips nothing less than any run, draws its pictures, writes its
checkpoints and tracks to MLflow when MLFLOW_TRACKING_URI is set. The bare loop calls the same `learner.step` on tensors
that are already in memory, in a process of its own with the same number of threads; for a run with several workers in
as many processes at once, each with its share of the batch. A training worker keeps freed memory
(`pipelines/training/allocator.py`), which a plain PyTorch process does not: a second bare loop that does so as well
tells what the pipeline costs beside that gain. For several workers a third one also averages its gradients over gloo as
the run does, so that one sees what is the pipeline's and what the collective's. All take turns, so that whatever else
the machine does meets all; the last line is one JSON object. Needs a running cluster and an ingested data set.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch.optim import Optimizer

import models
from infra.storage import default_store, open_storage
from jobs.entry import connect_ray, run_job
from models.contract import Batch, ImageShape
from pipelines.config import ClusterSpec, RunSpec
from pipelines.errors import FigmentError
from pipelines.recipes import RECIPES
from pipelines.training.allocator import keep_freed_memory
from pipelines.training.collectives import average_gradients

THREADS = 1
Kind = Literal["plain", "kept", "averaged"]
"""Of a bare loop: "kept" keeps freed memory, "averaged" does so and averages its gradients over the processes."""
RATIOS: dict[Kind, str] = {
    "plain": "ratio_vs_bare_loop",
    "kept": "ratio_vs_bare_loop_that_keeps_memory",
    "averaged": "ratio_vs_bare_loop_that_averages",
}


@dataclass(frozen=True)
class Arguments:
    dataset: str = "cifar10"
    """Ingested data set."""
    recipe: str = "dcgan-demo"
    """Whose model and batch size are measured; without the average of weights, which a bare loop has not."""
    images: int = 30_000
    """Images of one repetition."""
    repetitions: int = 3
    """Of a run and the bare loops."""
    workers: int = 1
    """Of the run, and processes of a bare loop."""
    bare: Kind | None = None
    """Only one process of a bare loop: what the benchmark calls itself with."""
    rank: int = 0
    """Of this process of a bare loop."""
    rendezvous: Path | None = None
    """A file that is not there yet, where the processes of a bare loop find one another."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.train_overhead", description=__doc__)
    spec = _spec(arguments)
    if arguments.bare:
        print(json.dumps({"images_per_s": bare_loop(spec, arguments)}))
        return
    kinds: list[Kind] = ["plain", "kept"] if arguments.workers == 1 else ["plain", "kept", "averaged"]
    found: list[dict[str, float]] = []
    for i in range(arguments.repetitions):
        speeds = {"run": _whole_run(spec)} | {kind: _bare_in_processes(arguments, kind) for kind in kinds}
        found.append(speeds)
        told = (f"{kind} {speeds[kind]:,.0f}: {speeds['run'] / speeds[kind]:.3f}" for kind in kinds)
        print(
            f"{i + 1}/{arguments.repetitions}: run {speeds['run']:,.0f} images/s; bare loops {', '.join(told)}",
            flush=True,
        )
    result = {
        "benchmark": "train_overhead",
        **{RATIOS[kind]: round(statistics.median(row["run"] / row[kind] for row in found), 4) for kind in kinds},
        "images_per_s": [{name: round(speed) for name, speed in row.items()} for row in found],
        "workers": arguments.workers,
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
        cluster=ClusterSpec(workers=arguments.workers, threads_per_worker=THREADS),
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


def _bare_in_processes(arguments: Arguments, kind: Kind) -> float:
    """Images/s of all processes together."""
    command = [sys.executable, "-m", "benchmarks.train_overhead", "--bare", kind, "--recipe", arguments.recipe]
    command += ["--images", str(arguments.images), "--workers", str(arguments.workers)]
    with tempfile.TemporaryDirectory(prefix="figment-bare-") as folder:
        processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--rendezvous", f"{folder}/meet"], stdout=subprocess.PIPE, text=True
            )
            for rank in range(arguments.workers)
        ]
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise FigmentError("a bare loop has failed: its error is above")
    return sum(float(json.loads(text.splitlines()[-1])["images_per_s"]) for text in said)


def bare_loop(spec: RunSpec, arguments: Arguments) -> float:
    """Images/s of `learner.step` on random CIFAR-shaped tensors in memory; steps cost the same whatever the pixels."""
    if arguments.bare != "plain":
        keep_freed_memory()
    torch.set_num_threads(THREADS)
    torch.manual_seed(spec.training.seed)
    learner = models.build(spec.model, ImageShape(3, 32, 32))
    images, size = arguments.images // arguments.workers, spec.training.batch_size // arguments.workers
    data = torch.randint(0, 256, (4_096, 3, 32, 32), dtype=torch.uint8)
    labels = torch.zeros(size, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    if arguments.workers > 1:
        meet = f"file://{arguments.rendezvous}"
        dist.init_process_group("gloo", init_method=meet, rank=arguments.rank, world_size=arguments.workers)
        if arguments.bare == "averaged":
            for optimizer in learner.optimizers().values():
                optimizer.register_step_pre_hook(_average)
        dist.barrier()  # all are measured while all compute
    started = time.perf_counter()
    seen = 0
    while seen < images:
        start = seen % (len(data) - size)
        learner.step(Batch(data[start : start + size], labels, seen), generator)
        seen += size
    speed = seen / (time.perf_counter() - started)
    if dist.is_initialized():
        dist.destroy_process_group()
    return speed


def _average(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    average_gradients([p for group in optimizer.param_groups for p in group["params"]])


if __name__ == "__main__":
    run_job(main)
