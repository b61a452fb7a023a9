"""The wiring to Ray Train: from a `RunSpec` to workers that run the loop, and back to an `Outcome`."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import torch
from pyarrow import fs as pafs
from ray.train.torch import TorchConfig, TorchTrainer, get_device

import models
from models.contract import ImageShape
from pipelines.config import RunSpec
from pipelines.data.manifest import load_manifest
from pipelines.errors import FigmentError
from pipelines.objects import exists, read_json, write_json
from pipelines.tracking import Tracking, send_outbox
from pipelines.training.allocator import keep_freed_memory
from pipelines.training.reporter import Outcome, Reporter, TrackedReporter
from pipelines.training.worker import Launch, Place, TrainingLoop

DATA_CPUS = 1.0
"""Logical CPUs that the data tasks of a run want beside the workers'."""


def launch(
    spec: RunSpec,
    fs: pafs.FileSystem,
    *,
    name: str,
    tracking: Tracking | None,
    tags: Mapping[str, str],
    say: Callable[[str], None],
) -> Outcome:
    """Train `spec` as the run `name` on the connected Ray cluster, from its newest checkpoint when it has one.

    `FigmentError` when the spec, the data set, the cluster or an earlier run of the same name does not fit.
    """
    spec.check()
    manifest = load_manifest(fs, spec.data.dataset)
    for split in (spec.data.split, spec.data.eval_split):
        manifest.shards(split)
    try:
        models.build(spec.model, ImageShape(*manifest.image_shape))
    except ValueError as error:
        raise FigmentError(f"the model cannot be built for the images of {spec.data.dataset!r}: {error}") from error
    run = Launch(name, spec, fs, manifest)
    finished = _claim(run)
    if finished is not None:
        if tracking is not None:  # what an unreachable server has not seen yet
            send_outbox(tracking, (fs, f"{run.folder}/tracking-outbox"))
        say(f"run {name!r} is complete at {finished.images_seen:,} images; choose another --name to train anew")
        return finished
    use_gpu = _check_cluster(spec)
    _describe(run, use_gpu, say)
    line = Line.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    attempt = uuid.uuid4().hex
    trainer = TorchTrainer(
        _work,
        train_loop_config={"run": run, "tracking": tracking, "tags": dict(tags), "line": line, "attempt": attempt},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=spec.cluster.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": spec.cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"{name}-{attempt[:8]}",  # Ray's own records, one folder a launch; ours are in the run's folder
            storage_path="ray-train",
            storage_filesystem=fs,
            failure_config=ray.train.FailureConfig(max_failures=spec.cluster.max_failures),
        ),
    )
    with _following(line, say):
        result = trainer.fit()
    answer = result.return_value
    if "error" in answer:
        raise FigmentError(answer["error"])
    return Outcome(**answer)


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train worker. Returns the outcome, or the user error that a worker of this launch met: such an error
    would only repeat itself, so the restart that Ray Train makes after it ends at once instead of training again."""
    run: Launch = config["run"]
    error_path = f"{run.folder}/errors/{config['attempt']}.json"
    if exists(run.fs, error_path):
        return {"error": read_json(run.fs, error_path)["error"]}
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), get_device())
    if run.spec.cluster.threads_per_worker:
        torch.set_num_threads(run.spec.cluster.threads_per_worker)
    if place.device.type == "cpu":
        keep_freed_memory()
    say = _speaker(config["line"])
    reporter: Reporter = Reporter()
    if place.rank == 0:
        reporter = TrackedReporter(run, place.device, config["tracking"], config["tags"], say)
    try:
        loop = TrainingLoop(run, place, reporter)
        figures = loop.run()
        outcome = reporter.finish(loop, figures)
    except FigmentError as error:
        write_json(run.fs, error_path, {"error": str(error)})
        reporter.fail(str(error))
        raise
    except BaseException as error:
        reporter.interrupt(f"{type(error).__name__}: {error}")
        raise
    return asdict(outcome) if outcome is not None else {}


def _claim(run: Launch) -> Outcome | None:
    """Tie the run's name to its spec; the outcome when the run is already complete."""
    path = f"{run.folder}/run.json"
    dataset = f"{run.manifest.name}@{run.manifest.version}"
    if exists(run.fs, path):
        known = read_json(run.fs, path)
        if known["identity"] != run.spec.identity or known["dataset"] != dataset:
            differences = _differences(known["spec"], run.spec.to_dict())
            if known["dataset"] != dataset:
                differences.append(f"data set version {known['dataset']} -> {dataset}")
            raise FigmentError(
                f"run {run.name!r} exists with other settings ({'; '.join(differences)});"
                " repeat its command to go on with it, or choose another --name"
            )
        outcome_path = f"{run.folder}/outcome.json"
        if exists(run.fs, outcome_path):
            outcome = Outcome(**read_json(run.fs, outcome_path))
            if outcome.images_seen >= run.spec.training.images:
                return outcome
    write_json(run.fs, path, {"identity": run.spec.identity, "dataset": dataset, "spec": run.spec.to_dict()})
    return None


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d
            for key in sorted(old.keys() | new.keys())
            for d in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if old == new else [f"{prefix} {old} -> {new}"]


def _check_cluster(spec: RunSpec) -> bool:
    """Whether to use GPUs; `FigmentError` when the cluster can never place the workers."""
    resources = ray.cluster_resources()
    gpus, workers = int(resources.get("GPU", 0)), spec.cluster.workers
    if spec.cluster.gpu == "yes" and gpus < workers:
        raise FigmentError(
            f"--cluster.gpu yes with {workers} workers needs {workers} GPUs, the cluster has {gpus};"
            " lower --cluster.workers, or use --cluster.gpu auto"
        )
    needed = workers * spec.cluster.cpus_per_worker + DATA_CPUS
    cpus = resources.get("CPU", 0.0)
    if cpus < needed:
        raise FigmentError(
            f"{workers} workers of {spec.cluster.cpus_per_worker:g} CPUs and the data tasks need {needed:g} logical"
            f" CPUs, the cluster has {cpus:g}; lower --cluster.workers or --cluster.cpus-per-worker, or add nodes"
        )
    return spec.cluster.gpu != "no" and gpus >= workers > 0


def _describe(run: Launch, use_gpu: bool, say: Callable[[str], None]) -> None:
    training, manifest, split = run.spec.training, run.manifest, run.spec.data.split
    shape = "x".join(str(n) for n in manifest.image_shape)
    workers = f"{run.spec.cluster.workers} worker(s) on {'GPU (nccl)' if use_gpu else 'CPU (gloo)'}"
    say(f"run {run.name}: {training.images:,} images in batches of {training.batch_size}, seed {training.seed}")
    say(f"data {manifest.name}@{manifest.version}: {manifest.rows(split):,} images {shape}, split {split!r}")
    say(f"{workers}; starting…")


@ray.remote
class Line:
    """Carries lines from the first worker to the job's own output; workers' stdout would come with Ray's prefixes."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def put(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


def _speaker(line: Any) -> Callable[[str], None]:
    def say(text: str) -> None:
        line.put.remote(text)  # fire and forget: speaking never waits

    return say


class _following:
    """Inside, lines that workers speak appear through `say`; all that were spoken have appeared when it ends."""

    def __init__(self, line: Any, say: Callable[[str], None]) -> None:
        self._line, self._say = line, say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="figment-line", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._stop.wait(0.5)
            try:
                lines = ray.get(self._line.take.remote())
            except ray.exceptions.RayError as error:
                logging.getLogger(__name__).warning("the run's live line was lost: %s", error)
                return
            for text in lines:
                self._say(text)
