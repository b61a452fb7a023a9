"""The training loop: what one worker does, for any `Learner`, alone or beside others.

It knows neither GAN nor VAE, and nothing of Ray but the stream that hands it batches: a test runs `TrainingLoop` in its
own process. Collectives run when there is more than one worker.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Generator, Tensor

import models
from models.contract import UNKNOWN, Asks, Batch, Evaluates, ImageShape, InitialisesFromData, Labelled, Measures
from pipelines.data.labelled import LabelledSubset, load_subset
from pipelines.data.plan import Cursor, training_plan
from pipelines.data.stream import evaluation_batches, training_batches
from pipelines.errors import FigmentError
from pipelines.training.checkpoint import Bundle, TrainingState, refuse_shared_tensors, restore, save_bundle
from pipelines.training.collectives import broadcast_from_first, gather
from pipelines.training.ema import Ema
from pipelines.training.gradients import guard_optimizers
from pipelines.training.health import Health
from pipelines.training.held_out import HeldOut, merged
from pipelines.training.history import Found, bundle_path, newest_bundle, prune_bundles, set_aside_later
from pipelines.training.launch import Launch, Place
from pipelines.training.reporter import Reporter


class TrainingLoop:
    """Built from the newest checkpoint of the run when there is one, else from the seed."""

    def __init__(self, launch: Launch, place: Place, reporter: Reporter) -> None:
        self.launch, self.place, self.reporter = launch, place, reporter
        self.spec = launch.spec
        training = self.spec.training
        torch.manual_seed(training.seed)  # the same initial weights on every worker
        self.learner = models.build(self.spec.model, ImageShape(*launch.manifest.image_shape))
        networks, optimizers = self.learner.networks(), self.learner.optimizers()
        self.classes = self.learner.needs().classes if isinstance(self.learner, Asks) else 0
        for network in networks.values():
            network.to(place.device)
        for optimizer in optimizers.values():
            optimizer.load_state_dict(optimizer.state_dict())  # moves state made at construction (Adagrad) along
        refuse_shared_tensors(networks)
        broadcast_from_first(networks)
        ema = Ema(networks, training.ema_half_life) if training.ema_half_life else None
        self.state = TrainingState(self.learner, ema, Generator(place.device))
        self.step, self.images_seen, self.cursor = 0, 0, Cursor.start(place.world_size)
        self._seed_randomness()
        found, damaged = newest_bundle(launch.fs, launch.folder, place.rank)
        for sentence in damaged:
            reporter.say(f"  ! {sentence}")
        if found is not None:
            self._resume(found)
            if place.rank == 0:
                set_aside_later(launch.fs, launch.folder, found.bundle.path)
        guard_optimizers(networks, optimizers, grad_clip=training.grad_clip, where=self._where)
        if training.compile:
            for network in networks.values():
                network.compile()
        self.health = Health(training.images)
        self.images_per_s = 0.0
        self.checkpoint_path = "" if found is None else found.bundle.path
        data = self.spec.data
        self.subset = (
            None if data.labels_per_class is None else load_subset(launch.fs, launch.folder, launch.manifest, data)
        )

    def _resume(self, found: Found) -> None:
        bundle = found.bundle
        dataset = f"{self.launch.manifest.name}@{self.launch.manifest.version}"
        if (bundle.dataset, bundle.spec.identity) != (dataset, self.spec.identity):
            raise FigmentError(
                f"{bundle.path} is of other settings or of another data set version ({bundle.dataset}) than this run"
                f" ({dataset}): its run.json was changed or lost; choose another --name"
            )
        self.step, self.images_seen = bundle.step, bundle.images_seen
        changed = restore(bundle, found.payloads, self.state, self.place.rank)
        if changed:
            self._seed_randomness()
        if bundle.cursor.world_size != self.place.world_size:
            changed = f"{self.place.world_size} worker(s) go on instead of {bundle.cursor.world_size}"
        data = self.spec.data
        plan = training_plan(
            self.launch.manifest, data.split, seed=self.spec.training.seed, shuffle_shards=data.shuffle_shards
        )
        self.cursor = bundle.cursor.resize(plan, self.place.world_size)
        self.reporter.say(f"resumed from {bundle.path} at {bundle.images_seen:,} images")
        if changed:
            self.reporter.say(f"  ! {changed}: from here on the numbers differ in their last bits or in their noise")

    def run(self) -> dict[str, float]:
        """Train to the end; the figures of the last evaluation (empty when the model has none)."""
        spec, training = self.spec, self.spec.training
        rows = training.batch_size // self.place.world_size
        reporter = self.reporter
        if self.images_seen >= training.images:
            reporter.begin()
        else:
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
                    batches=math.ceil((training.images - self.images_seen) / training.batch_size),
                    prefetch_batches=spec.data.prefetch_batches,
                )
            ) as batches:
                reporter.begin()  # while the stream starts
                first, started = self.images_seen, time.perf_counter()
                if self.images_seen == 0:
                    self._draw(-1)
                meter = Meter(self.images_seen)
                while self.images_seen < training.images:
                    arrays = next(batches)
                    before = self.images_seen
                    meter.add(self._train_on(*arrays))
                    if self._due(training.log_every, before):
                        metrics = meter.read(self.images_seen, batches.stall_seconds)
                        sentences = self.health.check_metrics(self.learner, metrics, self.images_seen)
                        reporter.metrics(metrics, self.images_seen, training.images, sentences)
                    if self._due(training.evaluate_every, before) and self.images_seen < training.images:
                        reporter.figures(self.evaluate(), self.images_seen)
                    self._draw(before)
                    if self._due(training.checkpoint_every, before):
                        self.save()
                self.images_per_s = (self.images_seen - first) / (time.perf_counter() - started)
        return self.evaluate()

    def _train_on(
        self, images: np.ndarray, labels: np.ndarray, columns: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Tensor]:
        """One step of all workers; images uint8 (B, C, H, W), labels int64 (B,), columns float32 (B, width)."""
        training, device = self.spec.training, self.place.device
        if self.subset is None:
            self._check_labels(labels, self.spec.data.split)
        batch = Batch(_to(device, images), _to(device, labels), self.images_seen, _each_to(device, columns or {}))
        if self.subset is not None:
            batch = self._semi_supervised(batch, self.subset)
        if self.step == 0 and isinstance(self.learner, InitialisesFromData):
            self.learner.initialise(batch, self.state.generator)
            broadcast_from_first(self.learner.networks())
        # No cache of cast weights: it would live as long as the block, and a second forward pass of a step (a critic's
        # second update) would use the weights from before the first.
        mixed = training.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
            metrics = self.learner.step(batch, self.state.generator)
        self.step += 1
        self.images_seen += training.batch_size
        self.cursor = self.cursor.advance(len(images))
        if self.state.ema is not None:
            self.state.ema.update(training.batch_size, self.images_seen)
        return metrics

    def _check_labels(self, labels: np.ndarray, split: str) -> None:
        """`FigmentError` for a row without the label that the model needs: the manifest counts names only."""
        wrong = labels[(labels < 0) | (labels >= self.classes)] if self.classes else labels[:0]
        if len(wrong):
            raise FigmentError(
                f"split {split!r} of data set {self.launch.manifest.name!r} has an image with label {wrong[0]}, and the"
                f" model needs labels 0 … {self.classes - 1}: ingest it with a label for each image"
            )

    def _semi_supervised(self, batch: Batch, subset: LabelledSubset) -> Batch:
        """The batch without its labels, and beside it half as many images of the labelled subset with theirs."""
        device, place = self.place.device, self.place
        images, labels = subset.draw(self.step, max(1, len(batch.images) // 2), place.rank, place.world_size)
        return replace(
            batch,
            labels=torch.full_like(batch.labels, UNKNOWN),
            labelled=Labelled(_to(device, images), _to(device, labels)),
        )

    def evaluate(self) -> dict[str, float]:
        """Means over the whole evaluation split, and figures of all of it together; each image counted once, whatever
        the number of workers."""
        learner, device = self.learner, self.place.device
        if not isinstance(learner, Evaluates | Measures):
            return {}
        generator = Generator(device).manual_seed(self._seed("evaluation", self.place.rank))
        own_codes = HeldOut(Generator(device).manual_seed(self._seed("encoding", self.place.rank)))
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
            for images, labels, columns in batches:
                if isinstance(learner, Evaluates):
                    self._check_labels(labels, self.spec.data.eval_split)
                batch = Batch(_to(device, images), _to(device, labels), self.images_seen, _each_to(device, columns))
                if isinstance(learner, Evaluates):
                    for name, values in learner.evaluate(batch, generator).items():
                        sums[name] = sums.get(name, 0.0) + float(values.double().sum())
                if isinstance(learner, Measures):
                    own_codes.add(learner, batch)
                count += len(images)
        parts = gather((sums, count))  # a worker may have had no image
        total = sum(n for _, n in parts)
        names = {name: None for part, _ in parts for name in part}
        means = {name: sum(part.get(name, 0.0) for part, _ in parts) / total for name in names}
        return merged(means, own_codes.figures(learner)) if isinstance(learner, Measures) else means

    def save(self) -> None:
        """One bundle; called by every worker at the same step."""
        launch, training, rank = self.launch, self.spec.training, self.place.rank
        if rank == 0:
            launch.check_owner()
        bundle = Bundle(
            path=bundle_path(launch.folder, self.images_seen, launch.fence),
            spec=self.spec,
            images_seen=self.images_seen,
            step=self.step,
            cursor=self.cursor,
            dataset=f"{launch.manifest.name}@{launch.manifest.version}",
            image_shape=launch.manifest.image_shape,
            files={},
        )
        self.checkpoint_path = bundle.path
        save_bundle(launch.fs, bundle, self.state, rank)
        if rank == 0:
            prune_bundles(launch.fs, launch.folder, training.keep_checkpoints, launch.fence)
            self.reporter.checkpoint(bundle.path)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside, the networks carry their moving average when the run keeps one."""
        return nullcontext() if self.state.ema is None else self.state.ema.swapped_in()

    def _draw(self, before: int) -> None:
        if self.place.rank == 0 and self.reporter.picture_due(before, self.images_seen):
            self.launch.check_owner()
            with self.averaged_weights(), torch.no_grad():
                self.reporter.draw(self.learner, self.images_seen, self.health)

    def _due(self, every: int, before: int) -> bool:
        """True when a multiple of `every` images was passed in this step, or the run has just ended; 0 is never."""
        return every > 0 and (
            self.images_seen // every > before // every or self.images_seen >= self.spec.training.images
        )

    def _where(self) -> str:
        return f"step {self.step + 1} ({self.images_seen:,} images seen)"

    def _seed_randomness(self) -> None:
        """This worker's own noise from here on; after a resume without the old states, none that was drawn before."""
        at = f" {self.images_seen}" if self.images_seen else ""
        torch.manual_seed(self._seed(f"torch{at}", self.place.rank))
        self.state.generator.manual_seed(self._seed(f"step{at}", self.place.rank))

    def _seed(self, purpose: str, rank: int) -> int:
        return derived_seed(self.spec.training.seed, purpose, rank)


class Meter:
    """Means of the step metrics over one logging interval, and speed."""

    def __init__(self, images_seen: int) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images, self._time, self._stall = images_seen, time.perf_counter(), 0.0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """No transfer from the device happens here."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, images_seen: int, stall_seconds: float) -> dict[str, float]:
        """Averages over the interval and over the workers, of each metric over the steps that had it;
        `images_per_s` and `data_stall` (share of the time that this worker waited for data) of this worker's interval.
        Starts the next interval."""
        values = torch.stack([value.double() for value in self._sums.values()]).tolist() if self._sums else []
        own = {name: (value, self._counts[name]) for name, value in zip(self._sums, values, strict=True)}
        everyone = gather(own)
        means: dict[str, float] = {}
        for name in {name: None for part in everyone for name in part}:
            parts = [part[name] for part in everyone if name in part]
            means[name] = sum(total for total, _ in parts) / sum(count for _, count in parts)
        now = time.perf_counter()
        elapsed = max(now - self._time, 1e-9)
        means["images_per_s"] = (images_seen - self._images) / elapsed
        means["data_stall"] = (stall_seconds - self._stall) / elapsed
        self._sums, self._counts = {}, {}
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


def _each_to(device: torch.device, columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: _to(device, values) for name, values in columns.items()}
