"""The wiring to Ray Train: from a `RunSpec` to workers that run the loop, and back to an `Outcome`."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import torch
from pyarrow import fs as pafs
from ray.train.torch import TorchConfig, TorchTrainer, get_device

import models
from models.contract import Asks, ImageShape, LimitsShare, Needs, Samples
from pipelines.config import RunSpec
from pipelines.data.labelled import choose_subset
from pipelines.data.manifest import Manifest
from pipelines.errors import FigmentError
from pipelines.evaluation.figures import check_measurable
from pipelines.lease import ConditionalStore, hold
from pipelines.objects import remove_folder
from pipelines.tracking import Status, Tracking, end_run, send_outbox
from pipelines.training.allocator import keep_freed_memory
from pipelines.training.claim import claim, data_of, finished
from pipelines.training.history import highest_fence
from pipelines.training.launch import Launch, Place, TakenOverError
from pipelines.training.line import following, open_line, speaker, spoken_warnings, tell_error, told_error
from pipelines.training.reporter import Outcome, Reporter, TrackedReporter
from pipelines.training.worker import TrainingLoop

log = logging.getLogger(__name__)

DATA_CPUS = 1.0
"""Logical CPUs that the data tasks of a run want beside the workers'."""

LEASE_S = 30.0  # how long the lease of a dead launch stands before the next one takes the run over
END_S = 20.0  # for telling the tracking server that a run has ended otherwise than well


def launch(
    spec: RunSpec,
    fs: pafs.FileSystem,
    *,
    name: str,
    tracking: Tracking | None,
    tags: Mapping[str, str],
    say: Callable[[str], None],
    leases: ConditionalStore | None = None,
) -> Outcome:
    """Train `spec` as the run `name` on the connected Ray cluster, from its newest checkpoint when it has one.

    `leases` is the storage of `fs` for conditional writes: one launch at a time owns the run. Without it nothing keeps
    a second one out. `FigmentError` when the spec, the data set, the cluster or an earlier run of the same name does
    not fit, or while another launch of the run lives.
    """
    spec.check()
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise FigmentError(f"--name {name!r} cannot be the name of a folder: use letters, digits, '-', '_' and '.'")
    outcome = finished(fs, name, spec)
    if outcome is None:
        _check_fits(spec, data_of(fs, name, spec, lambda line: None))
        use_gpu = _check_cluster(spec)
        with _owned(leases, fs, name, say) as (fence, token):
            outcome = finished(fs, name, spec)  # another launch may have begun or ended while this one waited
            if outcome is None:
                manifest = data_of(fs, name, spec, say)
                if spec.data.labels_per_class is not None:
                    choose_subset(fs, f"runs/{name}", manifest, spec.data)  # before a worker is waited for
                claim(fs, name, spec, manifest)
                return _train(Launch(name, spec, fs, manifest, fence, token), use_gpu, tracking, tags, say)
    if tracking is not None:  # what an unreachable server has not seen yet
        send_outbox(tracking, (fs, f"{outcome.folder}/tracking-outbox"))
    say(f"run {name!r} is complete at {outcome.images_seen:,} images; choose another --name to train anew")
    return outcome


def _train(
    run: Launch, use_gpu: bool, tracking: Tracking | None, tags: Mapping[str, str], say: Callable[[str], None]
) -> Outcome:
    _describe(run, use_gpu, say)
    line, cluster = open_line(), run.spec.cluster
    records = f"{run.folder}/ray-train"  # Ray Train's own, of use to nobody once it has returned; ours are in the run
    remove_folder(run.fs, records)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"run": run, "tracking": tracking, "tags": dict(tags), "line": line},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"{run.name}-{uuid.uuid4().hex[:8]}",
            storage_path=records,
            storage_filesystem=run.fs,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    try:
        try:
            with following(line, say):
                answer = trainer.fit().return_value
        finally:
            error = told_error(line)
            if error is not None:
                raise error
    except SystemExit as error:  # what Ray makes of Ctrl-C and of a job that is stopped
        _tell_end(run, tracking, "KILLED", "interrupted")
        raise KeyboardInterrupt from error
    except KeyboardInterrupt:
        _tell_end(run, tracking, "KILLED", "interrupted")
        raise
    except Exception as error:
        if not isinstance(error, TakenOverError):  # of such a run the new owner speaks
            _tell_end(run, tracking, "FAILED", " ".join(str(error).split())[:500] or type(error).__name__)
            if not _waited_for(error):
                remove_folder(run.fs, records)
        raise
    remove_folder(run.fs, records)
    return Outcome(**answer)


def _tell_end(run: Launch, tracking: Tracking | None, status: Status, reason: str) -> None:
    """What a worker that was lost, or is not the first, could not say. It takes `END_S` at most, also when the storage
    is away, and whatever happens to it leaves the true error alone."""
    if tracking is None:
        return

    def tell() -> None:
        try:
            run.check_owner()
            end_run(tracking, (run.fs, f"{run.folder}/tracking-outbox"), status, f"stopped: {reason}", END_S)
        except (FigmentError, OSError, ValueError, TypeError) as error:
            log.warning("MLflow does not hear how run %s ended: %s", run.name, error)

    telling = threading.Thread(target=tell, name="figment-end", daemon=True)
    telling.start()
    telling.join(END_S + 2)


def _waited_for(error: BaseException) -> bool:
    """Whether a storage was waited for until patience ended (`infra.patient`): waiting again would not help."""
    return getattr(error, "waited_s", None) is not None


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train worker. An error that would only repeat itself (the user's, or a storage that was waited for long
    enough) is told through the line, so the restart that Ray Train makes ends at once instead of training again."""
    run: Launch = config["run"]
    line = config["line"]
    if told_error(line) is not None:
        return {}
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), get_device())
    if run.spec.cluster.threads_per_worker:
        torch.set_num_threads(run.spec.cluster.threads_per_worker)
    if place.device.type == "cpu":
        keep_freed_memory()
    if run.spec.training.deterministic:
        _choose_deterministic_algorithms()
    say = speaker(line)
    reporter: Reporter = Reporter()
    first = place.rank == 0
    try:
        with spoken_warnings(say) if first else nullcontext():
            if first:
                reporter = TrackedReporter(run, place.device, config["tracking"], config["tags"], say)
            loop = TrainingLoop(run, place, reporter)
            figures = loop.run()
            outcome = reporter.finish(loop, figures)
    except FigmentError as error:
        tell_error(line, error)
        if not isinstance(error, TakenOverError):
            reporter.fail(str(error))
        raise
    except BaseException as error:
        if isinstance(error, OSError) and _waited_for(error):  # others may go away on another node
            tell_error(line, error)
            raise
        reporter.interrupt(f"{type(error).__name__}: {error}")
        raise
    return asdict(outcome) if outcome is not None else {}


def _choose_deterministic_algorithms() -> None:
    """The same bits from the same numbers on the same kind of processor (`table[index]` backward on two threads of a
    CPU is one that has others), but for operations that have no such algorithm: of these torch warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # for debugging only


@contextmanager
def _owned(
    leases: ConditionalStore | None, fs: pafs.FileSystem, name: str, say: Callable[[str], None]
) -> Iterator[tuple[int, str]]:
    """Inside, no other launch trains this run; (the number of this one among all that ever owned it, its token)."""
    if leases is None:
        yield 0, ""
        return
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    above = highest_fence(fs, f"runs/{name}")
    with hold(leases, f"runs/{name}/lease.json", holder, LEASE_S, say=say, above=above) as lease:
        yield lease.fence, lease.token


def _check_fits(spec: RunSpec, manifest: Manifest) -> None:
    """`FigmentError` for what else would only be found at the end of the run or at its first picture."""
    for split in (spec.data.split, spec.data.eval_split):
        manifest.shards(split)
    try:
        learner = models.build(spec.model, ImageShape(*manifest.image_shape))
    except ValueError as error:
        raise FigmentError(f"the model cannot be built for the images of {spec.data.dataset!r}: {error}") from error
    needs = learner.needs() if isinstance(learner, Asks) else Needs()
    _check_needs(needs, manifest)
    if spec.data.labels_per_class is not None and not needs.labelled:
        raise FigmentError(
            "--data.labels-per-class hides all labels but a few, and model"
            f" {models.name_of(spec.model)!r} learns from none of those; leave it out"
        )
    if isinstance(learner, LimitsShare):
        try:
            learner.check_share(spec.training.batch_size // spec.cluster.workers)
        except ValueError as error:
            batch = f"--training.batch-size {spec.training.batch_size} on {spec.cluster.workers} worker(s)"
            raise FigmentError(f"{batch} does not fit the model: {error}") from error
    if isinstance(learner, Samples):
        check_measurable(manifest.image_shape, manifest.rows(spec.data.eval_split), spec.data.eval_split)


def _check_needs(needs: Needs, manifest: Manifest) -> None:
    """`FigmentError` when the data set lacks labels or columns that the model cannot work without."""
    dataset, known = f"data set '{manifest.name}@{manifest.version}'", len(manifest.label_names)
    if needs.classes and known != needs.classes:
        has = f"has {known:,}" if known else "has no labels"
        raise FigmentError(
            f"the model needs labels 0 … {needs.classes - 1} ({needs.classes:,} classes), but {dataset} {has}; choose"
            " another data set, or the model's number of classes"
        )
    widths = {column.name: column.width for column in manifest.columns}
    for name, width in needs.columns.items():
        if widths.get(name) != width:
            has = f"that of {dataset} has {widths[name]}" if name in widths else f"{dataset} has none"
            others = ", ".join(f"{name} ({width})" for name, width in widths.items()) or "none"
            raise FigmentError(
                f"the model needs a column {name!r} of {width} numbers, but {has} (its columns: {others}); ingest a"
                " source that has it"
            )


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
    if run.spec.data.eval_split == split:
        say(f"  ! no image is held out: samples are compared with training images (split {split!r})")
    say(f"{workers}; starting…")
