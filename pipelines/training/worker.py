"""The training loop: what one worker does, for any `Learner`, alone or beside others.

It knows neither GAN nor VAE, and nothing of Ray but the stream that hands it batches: a test runs `TrainingLoop` in its
own process. Collectives run when there is more than one worker.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from pyarrow import fs as pafs
from torch import Generator, Tensor

import models
from models.contract import Batch, Evaluates, ImageShape
from pipelines.config import RunSpec
from pipelines.data.manifest import Manifest
from pipelines.data.plan import Cursor, training_plan
from pipelines.data.stream import evaluation_batches, training_batches
from pipelines.training.checkpoint import (
    Bundle,
    TrainingState,
    bundle_path,
    newest_bundle,
    prune_bundles,
    restore,
    save_bundle,
)
from pipelines.training.ema import Ema
from pipelines.training.gradients import average_over_workers, broadcast_from_first, guard_optimizers
from pipelines.training.health import Health
from pipelines.training.reporter import Reporter


@dataclass(frozen=True)
class Place:
    """Where a worker stands among the others."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Launch:
    """What a run needs, as values that travel to the workers."""

    name: str
    spec: RunSpec
    fs: pafs.FileSystem
    manifest: Manifest

    @property
    def folder(self) -> str:
        return f"runs/{self.name}"


class TrainingLoop:
    """Built from the newest checkpoint of the run when there is one, else from the seed."""

    def __init__(self, launch: Launch, place: Place, reporter: Reporter) -> None:
        self.launch, self.place, self.reporter = launch, place, reporter
        self.spec = launch.spec
        training = self.spec.training
        torch.manual_seed(training.seed)  # the same initial weights on every worker
        self.learner = models.build(self.spec.model, ImageShape(*launch.manifest.image_shape))
        networks, optimizers = self.learner.networks(), self.learner.optimizers()
        for network in networks.values():
            network.to(place.device)
        for optimizer in optimizers.values():
            optimizer.load_state_dict(optimizer.state_dict())  # moves state made at construction (Adagrad) along
        broadcast_from_first(networks)
        ema = Ema(networks, training.ema_half_life) if training.ema_half_life else None
        torch.manual_seed(self._seed("torch", place.rank))
        generator = Generator(place.device).manual_seed(self._seed("step", place.rank))
        self.state = TrainingState(self.learner, ema, generator)
        self.step, self.images_seen, self.cursor = 0, 0, Cursor.start(place.world_size)
        bundle = newest_bundle(launch.fs, launch.folder)
        if bundle is not None:
            restore(launch.fs, bundle, self.state, place.rank)
            self.step, self.images_seen = bundle.step, bundle.images_seen
            data = self.spec.data
            plan = training_plan(launch.manifest, data.split, seed=training.seed, shuffle_shards=data.shuffle_shards)
            self.cursor = bundle.cursor.resize(plan, place.world_size)
            reporter.say(f"resumed from {bundle.path} at {bundle.images_seen:,} images")
        guard_optimizers(networks, optimizers, grad_clip=training.grad_clip, where=self._where)
        if training.compile:
            for network in networks.values():
                network.compile()
        self.health = Health(training.images)
        self.images_per_s = 0.0
        self.checkpoint_path = "" if bundle is None else bundle.path

    def run(self) -> dict[str, float]:
        """Train to the end; the figures of the last evaluation (empty when the model has none)."""
        spec, training = self.spec, self.spec.training
        rows = training.batch_size // self.place.world_size
        reporter = self.reporter
        if self.images_seen < training.images:
            first, started = self.images_seen, time.perf_counter()
            with closing(
                training_batches(
                    self.launch.fs,
                    self.launch.manifest,
                    spec.data.split,
                    seed=training.seed,
                    shuffle_shards=spec.data.shuffle_shards,
                    cursor=self.cursor,
                    rank=self.place.rank,
                    batch_size=rows,
                    prefetch_batches=spec.data.prefetch_batches,
                )
            ) as batches:
                if self.images_seen == 0:
                    self._draw(-1)  # while the stream starts
                meter = Meter(self.images_seen)
                while self.images_seen < training.images:
                    images, labels = next(batches)
                    before = self.images_seen
                    meter.add(self._train_on(images, labels))
                    if self._due(training.log_every, before):
                        metrics = meter.read(self.images_seen, batches.stall_seconds, self.place.world_size)
                        sentences = self.health.check_metrics(self.learner, metrics, self.images_seen)
                        reporter.metrics(metrics, self.images_seen, training.images, sentences)
                    if self._due(training.evaluate_every, before) and self.images_seen < training.images:
                        reporter.figures(self.evaluate(), self.images_seen)
                    self._draw(before)
                    if self._due(training.checkpoint_every, before):
                        self.save()
                self.images_per_s = (self.images_seen - first) / (time.perf_counter() - started)
        return self.evaluate()

    def _train_on(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
        """One step of all workers; images uint8 (B, C, H, W), labels int64 (B,)."""
        training, device = self.spec.training, self.place.device
        batch = Batch(_to(device, images), _to(device, labels), self.images_seen)
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            metrics = self.learner.step(batch, self.state.generator)
        self.step += 1
        self.images_seen += training.batch_size
        self.cursor = self.cursor.advance(len(images))
        if self.state.ema is not None:
            self.state.ema.update(training.batch_size, self.images_seen)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Means over the whole evaluation split, each image counted once, whatever the number of workers."""
        if not isinstance(self.learner, Evaluates):
            return {}
        generator = Generator(self.place.device).manual_seed(self._seed("evaluation", self.place.rank))
        sums: dict[str, float] = {}
        count = 0
        data = evaluation_batches(
            self.launch.fs,
            self.launch.manifest,
            self.spec.data.eval_split,
            rank=self.place.rank,
            world_size=self.place.world_size,
            batch_size=500,
        )
        with self.averaged_weights(), torch.no_grad(), closing(data) as batches:
            for images, labels in batches:
                device = self.place.device
                batch = Batch(_to(device, images), _to(device, labels), self.images_seen)
                for name, values in self.learner.evaluate(batch, generator).items():
                    sums[name] = sums.get(name, 0.0) + float(values.double().sum())
                count += len(images)
        parts: list[tuple[dict[str, float], int]] = [(sums, count)]
        if self.place.world_size > 1:
            parts = [({}, 0)] * self.place.world_size
            dist.all_gather_object(parts, (sums, count))
        total = sum(n for _, n in parts)
        return {name: sum(s[name] for s, n in parts if n) / total for name in parts[0][0]}

    def save(self) -> None:
        """One bundle; called by every worker at the same step."""
        launch, training = self.launch, self.spec.training
        bundle = Bundle(
            path=bundle_path(launch.folder, self.images_seen),
            spec=self.spec,
            images_seen=self.images_seen,
            step=self.step,
            cursor=self.cursor,
            dataset=f"{launch.manifest.name}@{launch.manifest.version}",
            image_shape=launch.manifest.image_shape,
            files={},
        )
        self.checkpoint_path = bundle.path
        save_bundle(launch.fs, bundle, self.state, self.place.rank, self.barrier)
        if self.place.rank == 0:
            prune_bundles(launch.fs, launch.folder, training.keep_checkpoints)
            self.reporter.checkpoint(bundle.path)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside, the networks carry their moving average when the run keeps one."""
        return nullcontext() if self.state.ema is None else self.state.ema.swapped_in()

    def barrier(self) -> None:
        if self.place.world_size > 1:
            dist.barrier()

    def _draw(self, before: int) -> None:
        if self.place.rank == 0 and self.reporter.picture_due(before, self.images_seen):
            with self.averaged_weights(), torch.no_grad():
                self.reporter.draw(self.learner, self.images_seen, self.health)

    def _due(self, every: int, before: int) -> bool:
        """True when a multiple of `every` images was passed in this step, or the run has just ended; 0 is never."""
        return every > 0 and (
            self.images_seen // every > before // every or self.images_seen >= self.spec.training.images
        )

    def _where(self) -> str:
        return f"step {self.step + 1} ({self.images_seen:,} images seen)"

    def _seed(self, purpose: str, rank: int) -> int:
        return derived_seed(self.spec.training.seed, purpose, rank)


class Meter:
    """Means of the step metrics over one logging interval, and speed."""

    def __init__(self, images_seen: int) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._images, self._time, self._stall = images_seen, time.perf_counter(), 0.0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """No transfer from the device happens here."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1

    def read(self, images_seen: int, stall_seconds: float, world_size: int) -> dict[str, float]:
        """Averages over the interval and over the workers; `images_per_s` and `data_stall` (share of the time that
        this worker waited for data) of this worker's interval. Starts the next interval."""
        names = list(self._sums)
        values = torch.stack([self._sums[name].float() for name in names]) / self._steps
        if world_size > 1:
            average_over_workers([values])
        means = dict(zip(names, values.tolist(), strict=True))
        now = time.perf_counter()
        elapsed = max(now - self._time, 1e-9)
        means["images_per_s"] = (images_seen - self._images) / elapsed
        means["data_stall"] = (stall_seconds - self._stall) / elapsed
        self._sums, self._steps = {}, 0
        self._images, self._time, self._stall = images_seen, now, stall_seconds
        return means


def derived_seed(seed: int, purpose: str, rank: int = 0) -> int:
    """Independent streams of randomness from one seed."""
    words = np.random.SeedSequence([seed, rank, *purpose.encode()]).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
