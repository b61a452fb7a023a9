"""What the loop counts, draws at random, logs and saves, and when; alone, and as one of two workers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import fs as pafs

from models.contract import Batch, Metrics
from pipelines.config import RunSpec
from pipelines.data import stream
from pipelines.data.windows import Layout, Read
from pipelines.objects import children, read_json, read_object, write_json
from pipelines.training.checkpoint import _body_hash
from pipelines.training.ema import Ema
from pipelines.training.launch import Launch, Place
from pipelines.training.reporter import Reporter
from pipelines.training.worker import Meter, TrainingLoop
from tests.pipelines.training.toys import toy_dataset, toy_spec


def _of(rank: int, world: int, fs: pafs.FileSystem, spec: RunSpec, reporter: Reporter | None = None) -> TrainingLoop:
    """One of several workers, without the others: what they do together is left out."""
    place = Place(rank, world, torch.device("cpu"))
    return TrainingLoop(Launch("n", spec, fs, toy_dataset(fs)), place, reporter or Reporter())


def _record(loop: TrainingLoop, seen: list[bytes]) -> TrainingLoop:
    train_on = loop._train_on

    def recorded(images: np.ndarray, *others: Any) -> dict[str, torch.Tensor]:
        seen.extend(image.tobytes() for image in images)
        return train_on(images, *others)

    loop._train_on = recorded  # type: ignore[method-assign]
    return loop


def _step(loop: TrainingLoop) -> None:
    """One step on noise, of as many images as a batch has for this worker."""
    rows = loop.spec.training.batch_size // loop.place.world_size
    images = np.random.default_rng(loop.step).integers(0, 256, (rows, 1, 8, 8), dtype=np.uint8)
    loop._train_on(images, np.zeros(rows, np.int64))


class Recording(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.evaluated: list[int] = []
        self.checkpoints: list[str] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def metrics(self, metrics: Mapping[str, float], images_seen: int, total: int, sentences: list[str]) -> None:
        self.logged.append((images_seen, dict(metrics)))

    def figures(self, figures: Mapping[str, float], images_seen: int) -> None:
        self.evaluated.append(images_seen)

    def checkpoint(self, path: str) -> None:
        self.checkpoints.append(path)


@pytest.mark.usefixtures("in_process")
def test_no_more_is_read_than_a_run_trains_on(store: pafs.FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a resume: the rows of 7 batches of 20, and then of the 3 that are left."""
    read: list[int] = []
    blocks = stream._blocks

    def counted(fs: pafs.FileSystem, layout: Layout, reads: Iterator[Read]) -> Generator[pa.Table, None, None]:
        wanted = [*reads]
        read.append(sum(item.rows for item in wanted))
        return blocks(fs, layout, iter(wanted))

    monkeypatch.setattr(stream, "_blocks", counted)
    spec = toy_spec("dcgan", images=130)
    spec = replace(spec, training=replace(spec.training, checkpoint_every=0))
    _of(0, 1, store, spec).run()
    later = _of(0, 1, store, spec)
    for _ in range(4):
        _step(later)
    later.save()
    _of(0, 1, store, spec).run()
    assert read == [140, 60]


@pytest.mark.usefixtures("in_process")
def test_the_loop_logs_evaluates_and_saves_when_a_multiple_is_passed_and_at_the_end(store: pafs.FileSystem) -> None:
    """Batches of 20; 0 is never, and of the checkpoints the newest two stay."""
    spec = toy_spec("vae", images=130)
    training = replace(spec.training, log_every=50, evaluate_every=45, checkpoint_every=40)
    reporter = Recording()
    loop = _of(0, 1, store, replace(spec, training=training), reporter)
    assert "elbo" in loop.run()
    assert [seen for seen, _ in reporter.logged] == [60, 100, 140]
    assert reporter.evaluated == [60, 100]  # the end's own figures are what the run returns
    assert reporter.checkpoints == [f"runs/n/checkpoints/{seen:012d}-00000" for seen in (40, 80, 120, 140)]
    assert children(store, "runs/n/checkpoints") == ["000000000120-00000", "000000000140-00000"]
    assert (
        loop.checkpoint_path
        == reporter.checkpoints[-1]
        == f"runs/n/checkpoints/{children(store, 'runs/n/checkpoints')[-1]}"
    )
    assert (loop.step, loop.images_seen) == (7, 140)

    training = replace(training, log_every=0, evaluate_every=0, checkpoint_every=0)
    silent = Recording()
    store.delete_dir("runs")
    _of(0, 1, store, replace(spec, training=training), silent).run()
    assert not (silent.logged or silent.evaluated or silent.checkpoints)


def test_the_meter_tells_means_and_speed_of_its_own_interval() -> None:
    began = time.perf_counter()
    meter = Meter(100)
    kept = torch.tensor(0.0)
    for loss in (1.0, 4.0):
        meter.add({"loss": kept.fill_(loss)})  # a model may write each step's figure into the same tensor
    before_read = time.perf_counter()
    first = meter.read(140, stall_seconds=2.0)
    assert first["loss"] == 2.5
    assert first["images_per_s"] >= 40 / (time.perf_counter() - began)
    assert first["data_stall"] / first["images_per_s"] == pytest.approx(2.0 / 40)
    meter.add({"loss": torch.tensor(7.0)})
    second = meter.read(150, stall_seconds=5.0)
    assert second["loss"] == 7.0
    assert second["images_per_s"] >= 10 / (time.perf_counter() - before_read)
    assert second["data_stall"] / second["images_per_s"] == pytest.approx(3.0 / 10)


def test_the_moving_average_and_the_clock_count_the_images_of_all_workers(store: pafs.FileSystem) -> None:
    loop = _of(0, 2, store, toy_spec("vae"))
    assert loop.state.ema is not None
    reference = Ema(loop.learner.networks(), loop.spec.training.ema_half_life)
    clocks = []
    step = loop.learner.step

    def kept(batch: Batch, generator: torch.Generator) -> Metrics:
        clocks.append(batch.images_seen)
        return step(batch, generator)

    loop.learner.step = kept  # type: ignore[method-assign]
    for seen in (20, 40, 60):
        _step(loop)
        reference.update(20, seen)
    assert all(torch.equal(t, loop.state.ema.state[name]) for name, t in reference.state.items())
    assert clocks == [0, 20, 40], "images seen before the batch"
    assert (loop.images_seen, loop.step, loop.cursor.rows) == (60, 3, 30)


def test_gradients_are_clipped_to_the_length_in_the_spec(store: pafs.FileSystem) -> None:
    spec = toy_spec("vae")
    loop = _of(0, 1, store, replace(spec, training=replace(spec.training, grad_clip=1e-3)))
    _step(loop)
    for optimizer in loop.learner.optimizers().values():
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-3)


def test_workers_begin_with_equal_weights_and_noise_of_their_own(store: pafs.FileSystem) -> None:
    first, noise = _of(0, 2, store, toy_spec("vae")), torch.initial_seed()
    second = _of(1, 2, store, toy_spec("vae"))
    assert noise != torch.initial_seed()
    assert first.state.generator.initial_seed() != second.state.generator.initial_seed()
    for name, network in first.learner.networks().items():
        for tensor, other in zip(
            network.state_dict().values(), second.learner.networks()[name].state_dict().values(), strict=True
        ):
            assert torch.equal(tensor, other), name


@pytest.mark.usefixtures("in_process")
def test_two_workers_and_then_one_see_every_image_of_an_epoch_once(store: pafs.FileSystem) -> None:
    """60 of 70 images by two workers in turn, the other 10 by one that goes on alone into the next."""
    seen: list[bytes] = []
    spec = toy_spec("vae", images=60, checkpoint_every=60)
    for rank in (1, 0):  # the first worker last: it writes what is gone on from
        loop = _of(rank, 2, store, spec)
        _record(loop, seen).run()
    assert len(seen) == len(set(seen)) == 60
    alone = replace(spec, training=replace(spec.training, images=80))
    reporter = Recording()
    _record(_of(0, 1, store, alone, reporter), seen).run()
    assert any("1 worker(s) go on instead of 2" in line for line in reporter.said)
    assert len(set(seen[:70])) == 70
    assert len(set(seen[70:])) == 10


def test_each_worker_goes_on_with_the_random_states_that_were_its_own(store: pafs.FileSystem) -> None:
    states = {}
    for rank in (1, 0):
        loop = _of(rank, 2, store, toy_spec("vae"))
        _step(loop)
        states[rank] = loop.state.generator.get_state()
        loop.save()
    where = f"{loop.checkpoint_path}/bundle.json"
    body = read_json(store, where)
    others = hashlib.sha256(read_object(store, f"{loop.checkpoint_path}/rank-00001.pt")).hexdigest()
    del body["sha256"]
    body["files"]["rank-00001.pt"] = others  # as when both were there
    write_json(store, where, {**body, "sha256": _body_hash(body)})
    for rank, state in states.items():
        assert torch.equal(_of(rank, 2, store, toy_spec("vae")).state.generator.get_state(), state)
    assert not torch.equal(states[0], states[1])
