"""Which rows may show their labels, and which come in which step: pure functions, the same at any world size."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from pipelines.config import DataSpec
from pipelines.data import labelled
from pipelines.data.labelled import LabelledSubset, choose_subset, load_subset, rows_by_class
from pipelines.data.manifest import Manifest, save_manifest
from pipelines.errors import FigmentError
from pipelines.objects import read_json, write_json, write_object
from tests.pipelines.data.shards import image_of, write_shard

SHAPE = (3, 8, 8)
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, -1], [9, 14, 5, 12])).astype(np.int32)
DATA = DataSpec("rows", labels_per_class=4, labels_seed=1)


def dataset(fs: pafs.FileSystem, encoding: str = "raw", labels: np.ndarray = LABELS) -> Manifest:
    """Row i has the pixels of `image_of(i)`; three shards."""
    parts = np.split(np.arange(len(labels)), [11, 30])
    shards = tuple(
        write_shard(fs, "datasets/rows", np.stack([image_of(i, SHAPE) for i in part]), labels[part], encoding)
        for part in parts
    )
    manifest = Manifest(
        name="rows",
        splits={"train": shards},
        image_shape=SHAPE,
        encoding=encoding,
        label_names=("zero", "one", "two"),
        channel_mean=(127.5,) * 3,
        source={"format": "made by the tests"},
        created_at="2026-01-01T00:00:00+00:00",
    )
    save_manifest(fs, manifest)
    return manifest


@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_each_class_has_so_many_rows_of_its_own_and_more_labels_add_to_fewer(seed: int, per_class: int, noise: int):
    rows = rows_by_class(LABELS, per_class, seed, ("zero", "one", "two"))
    assert {label: len(set(found)) for label, found in rows.items()} == {0: per_class, 1: per_class, 2: per_class}
    assert all((LABELS[found] == label).all() for label, found in rows.items())
    fewer = rows_by_class(LABELS, max(1, per_class - 1), seed, ("zero", "one", "two"))
    assert all(rows[label][: len(found)] == found for label, found in fewer.items())
    np.random.seed(noise % 2**32)  # nothing global decides
    assert rows_by_class(LABELS, per_class, seed, ("zero", "one", "two")) == rows


def test_the_rows_are_the_same_for_ever() -> None:
    """A run that is resumed under another version of numpy, or of Figment, must not see other labels."""
    labels = np.arange(60) % 3
    assert rows_by_class(labels, 3, 7, ("a", "b", "c")) == {0: [9, 24, 33], 1: [46, 49, 28], 2: [17, 5, 26]}


def test_another_seed_draws_others() -> None:
    labels = np.zeros(1000, np.int32)
    drawn = [frozenset(rows_by_class(labels, 10, seed, ("only",))[0]) for seed in range(20)]
    assert len(set(drawn)) == 20


def test_every_row_of_a_class_is_as_likely_as_another() -> None:
    labels = np.zeros(20, np.int32)
    times = Counter(row for seed in range(2000) for row in rows_by_class(labels, 5, seed, ("only",))[0])
    assert all(abs(times[row] - 500) < 5 * (500 * 0.75) ** 0.5 for row in range(20))  # five standard deviations


def test_what_cannot_be_drawn_is_refused_in_a_sentence() -> None:
    with pytest.raises(FigmentError, match=r"is 6, class 'two' has 5 labelled images; choose fewer"):
        rows_by_class(LABELS, 6, 0, ("zero", "one", "two"))
    with pytest.raises(FigmentError, match="class 'three' has 0 labelled images"):
        rows_by_class(LABELS, 1, 0, ("zero", "one", "two", "three"))
    with pytest.raises(FigmentError, match="this one has none"):
        rows_by_class(np.full(9, -1), 1, 0, ())


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_the_images_are_those_of_the_rows(store: pafs.FileSystem, encoding: str) -> None:
    manifest = dataset(store, encoding)
    subset = load_subset(store, "runs/n", manifest, DATA)
    rows = read_json(store, "runs/n/labelled.json")["rows"]
    assert rows == {str(k): v for k, v in rows_by_class(LABELS, 4, 1, manifest.label_names).items()}
    in_turn = [row for label in "012" for row in rows[label]]
    np.testing.assert_array_equal(subset.images, np.stack([image_of(row, SHAPE) for row in in_turn]))
    np.testing.assert_array_equal(subset.labels, LABELS[in_turn])
    again = load_subset(store, "runs/n", manifest, DATA)
    np.testing.assert_array_equal(again.images, subset.images)


def test_a_run_keeps_the_rows_that_it_began_with(store: pafs.FileSystem) -> None:
    manifest = dataset(store)
    rows = choose_subset(store, "runs/n", manifest, DATA)
    path = "runs/n/labelled.json"
    assert choose_subset(store, "runs/n", manifest, DATA) == rows
    for other in (replace(DATA, labels_per_class=3), replace(DATA, labels_seed=2)):
        with pytest.raises(FigmentError, match="is of another labelled subset"):
            choose_subset(store, "runs/n", manifest, other)
    body = read_json(store, path)
    write_json(store, path, {**body, "rows": {"0": body["rows"]["1"]}})
    with pytest.raises(FigmentError, match="gives other labels than shard"):
        load_subset(store, "runs/n", manifest, DATA)
    first, *others = body["rows"]["0"]
    wrong = (["x"], [first, first, *others], [-1, *others], [manifest.rows("train"), *others])
    damaged_rows = [json.dumps({**body, "rows": body["rows"] | {"0": rows}}).encode() for rows in wrong]
    for damaged in (*damaged_rows, json.dumps({**body, "rows": {}}).encode(), b"", b'{"rows"', b"[1]"):
        write_object(store, path, damaged)
        with pytest.raises(FigmentError, match=r"labelled\.json cannot be read"):
            choose_subset(store, "runs/n", manifest, DATA)


def test_a_damaged_shard_and_a_large_subset_are_refused(
    store: pafs.FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = dataset(store)
    monkeypatch.setattr(labelled, "MOST_BYTES", 12 * 192 - 1)
    with pytest.raises(FigmentError, match="the most; choose fewer"):
        choose_subset(store, "runs/n", manifest, DATA)
    monkeypatch.undo()
    choose_subset(store, "runs/n", manifest, DATA)
    shard = manifest.shards("train")[1]
    write_object(store, f"datasets/rows/{shard.path}", b"x" * shard.bytes)
    with pytest.raises(FigmentError, match="is damaged"):
        load_subset(store, "runs/n", manifest, DATA)
    with pytest.raises(FigmentError, match="has no readable labels"):
        choose_subset(store, "runs/other", manifest, DATA)


@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 4), st.integers(0, 30), st.integers(0, 9))
def test_all_ranks_together_see_each_image_equally_often(n: int, count: int, world: int, steps: int, seed: int):
    subset = LabelledSubset(np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1), np.arange(n), seed)
    seen: Counter[int] = Counter({row: 0 for row in range(n)})
    for step in range(steps):
        for rank in range(world):
            images, labels = subset.draw(step, count, rank, world)
            assert images.shape == (count, 1, 1, 1)
            assert (images.ravel() == labels).all()
            seen.update(labels.tolist())
    assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_workers_draws_the_same_rows_in_a_step(world: int) -> None:
    subset = LabelledSubset(np.zeros((10, 1, 1, 1), np.uint8), np.arange(10), 3)
    for step in range(7):
        alone = subset.draw(step, 8, 0, 1)[1]
        together = np.concatenate([subset.draw(step, 8 // world, rank, world)[1] for rank in range(world)])
        np.testing.assert_array_equal(together, alone)


def test_each_round_has_another_order() -> None:
    subset = LabelledSubset(np.zeros((50, 1, 1, 1), np.uint8), np.arange(50), 0)
    rounds = [tuple(subset.draw(step, 50, 0, 1)[1].tolist()) for step in range(10)]
    assert len(set(rounds)) == 10
    assert all(sorted(order) == list(range(50)) for order in rounds)
