"""What a learner sees of labels in a run with a labelled subset: those of the subset, and no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs

from models.contract import UNKNOWN, Batch, Metrics
from pipelines.config import RunSpec
from pipelines.data.windows import Layout, read_rows
from pipelines.errors import FigmentError
from pipelines.objects import read_json
from pipelines.training.launch import Launch, Place
from pipelines.training.reporter import Reporter
from pipelines.training.worker import TrainingLoop
from tests.pipelines.training.toys import toy_dataset, toy_spec

PER_CLASS = 3


def spec_of(images: int, checkpoint_every: int = 10**9) -> RunSpec:
    spec = toy_spec("vae", images=images, checkpoint_every=checkpoint_every)
    return replace(spec, data=replace(spec.data, labels_per_class=PER_CLASS))


def watched(fs: pafs.FileSystem, spec: RunSpec, seen: list[Batch], rank: int = 0, world: int = 1) -> TrainingLoop:
    place = Place(rank, world, torch.device("cpu"))
    loop = TrainingLoop(Launch("n", spec, fs, toy_dataset(fs)), place, Reporter())
    step = loop.learner.step

    def recorded(batch: Batch, generator: torch.Generator) -> Metrics:
        seen.append(batch)
        return step(batch, generator)

    loop.learner.step = recorded  # type: ignore[method-assign]
    return loop


def pairs(batch: Batch) -> list[tuple[bytes, int]]:
    assert batch.labelled is not None
    images, labels = batch.labelled.images.numpy(), batch.labelled.labels.tolist()
    return [(image.tobytes(), label) for image, label in zip(images, labels, strict=True)]


@pytest.mark.usefixtures("in_process")
def test_no_label_but_those_of_the_subset_reaches_the_learner(store: pafs.FileSystem) -> None:
    seen: list[Batch] = []
    watched(store, spec_of(120), seen).run()
    assert len(seen) == 6
    assert all((batch.labels == UNKNOWN).all() and batch.labels.dtype == torch.int64 for batch in seen)

    manifest, rows = toy_dataset(store), read_json(store, "runs/n/labelled.json")["rows"]
    layout, allowed, first = Layout.of(manifest), set(), 0
    for shard in manifest.shards("train"):
        for label in rows:
            inside = np.asarray([row - first for row in rows[label] if first <= row < first + shard.rows], np.int64)
            pixels, labels = read_rows(store, layout, shard, inside)
            allowed |= {(image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)}
        first += shard.rows
    assert len(allowed) == 2 * PER_CLASS
    drawn = [pairs(batch) for batch in seen]
    assert {len(pair) for pair in drawn} == {10}, "half as many as images"
    assert set().union(*drawn) == allowed


@pytest.mark.usefixtures("in_process")
def test_without_a_subset_labels_are_what_they_are(store: pafs.FileSystem) -> None:
    seen: list[Batch] = []
    watched(store, toy_spec("vae", images=40), seen).run()
    assert all(batch.labelled is None for batch in seen)
    assert set(seen[0].labels.tolist()) == {0, 1}


@pytest.mark.usefixtures("in_process")
def test_evaluation_sees_true_labels(store: pafs.FileSystem) -> None:
    loop = watched(store, spec_of(20), [])
    evaluate, labels = loop.learner.evaluate, set()  # type: ignore[attr-defined]

    def recorded(batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        labels.update(batch.labels.tolist())
        return evaluate(batch, generator)

    loop.learner.evaluate = recorded  # type: ignore[attr-defined]
    loop.run()
    assert labels == {0, 1}


@pytest.mark.usefixtures("in_process")
def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(store: pafs.FileSystem) -> None:
    whole: list[Batch] = []
    watched(store, spec_of(160), whole).run()
    store.delete_dir("runs")
    parts: list[Batch] = []
    watched(store, spec_of(60, checkpoint_every=60), parts).run()
    watched(store, spec_of(160), parts).run()
    assert [pairs(batch) for batch in parts] == [pairs(batch) for batch in whole]
    assert pairs(whole[0]) != pairs(whole[1])


@pytest.mark.usefixtures("in_process")
def test_two_workers_share_the_draw_of_one(store: pafs.FileSystem) -> None:
    alone: list[Batch] = []
    watched(store, spec_of(60), alone).run()
    store.delete_dir("runs")
    shares: list[list[Batch]] = [[], []]
    for rank in (1, 0):
        watched(store, spec_of(60), shares[rank], rank, 2).run()
    together = [pairs(first) + pairs(second) for first, second in zip(*shares, strict=True)]
    assert together == [pairs(batch) for batch in alone]


def test_a_spec_says_at_least_one_label() -> None:
    spec = spec_of(20)
    for fields, words in (
        ({"labels_per_class": 0}, "labels-per-class is 0"),
        ({"labels_seed": -1}, "labels-seed is -1"),
    ):
        with pytest.raises(FigmentError, match=words):
            replace(spec, data=replace(spec.data, **fields)).check()
