"""The labelled subset of a semi-supervised run: which rows may show their labels, and which of them come in which step.

Both are pure functions: the rows of (manifest, split, labels a class, seed), the draws of (seed, step, rank, number of
workers). A run keeps its rows in runs/NAME/labelled.json, so that one can see them and a resumed run has the same:

    {"dataset": "NAME@VERSION", "split", "labels_per_class", "seed", "rows": {"0": [17, 4711, …], …}}

where a row is counted through the shards of the split in stored order.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipelines.config import DataSpec
from pipelines.data.manifest import Manifest, Shard
from pipelines.data.plan import permutation
from pipelines.data.windows import Layout, read_rows
from pipelines.errors import FigmentError
from pipelines.objects import exists, read_object, write_json

MOST_BYTES = 2**30
"""Of the images of a subset, which every worker holds in memory."""

_READERS = 8  # label columns that are fetched at the same time
_ROWS, _DRAWS = 3, 4  # what a permutation is for; 0, 1 and 2 are the plan's


@dataclass(frozen=True)
class LabelledSubset:
    """Its images in memory, in one order for all workers."""

    images: np.ndarray  # uint8 (N, C, H, W)
    labels: np.ndarray  # int64 (N,)
    seed: int

    def draw(self, step: int, count: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` images and labels for this rank's step. All ranks together go through the subset again and again,
        each time in another order: after any step two images differ by one draw at most."""
        first = (step * world_size + rank) * count
        places = first + np.arange(count)
        rounds, offsets = places // len(self.images), places % len(self.images)
        rows = np.empty(count, np.int64)
        for number in np.unique(rounds).tolist():
            order = permutation(len(self.images), self.seed, number, _DRAWS)
            rows[rounds == number] = order[offsets[rounds == number]]
        return self.images[rows], self.labels[rows]


def rows_by_class(labels: np.ndarray, per_class: int, seed: int, names: tuple[str, ...]) -> dict[int, list[int]]:
    """Class -> its rows; more labels a class add to the rows of fewer. labels: (N,), negative: unlabelled.

    `FigmentError` when a class has fewer images than that.
    """
    chosen: dict[int, list[int]] = {}
    for label in sorted({*np.unique(labels).tolist(), *range(len(names))}):
        if label < 0:
            continue
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            called = repr(names[label]) if label < len(names) else str(label)
            raise FigmentError(
                f"--data.labels-per-class is {per_class}, class {called} has {len(rows)} labelled images; choose fewer"
            )
        chosen[label] = rows[permutation(len(rows), seed, label, _ROWS)[:per_class]].tolist()
    if not chosen:
        raise FigmentError("--data.labels-per-class needs a data set with labels, and this one has none")
    return chosen


def choose_subset(fs: pafs.FileSystem, folder: str, manifest: Manifest, data: DataSpec) -> dict[int, list[int]]:
    """The rows of the run in `folder`: those that it began with, or those that it begins with now.

    `FigmentError` when a class has too few images, the subset is too large for memory, or labelled.json is of another.
    """
    if data.labels_per_class is None:
        raise ValueError("a run without labels_per_class has no labelled subset")
    head = {
        "dataset": f"{manifest.name}@{manifest.version}",
        "split": data.split,
        "labels_per_class": data.labels_per_class,
        "seed": data.labels_seed,
    }
    path = f"{folder}/labelled.json"
    if exists(fs, path):
        return _stored(read_object(fs, path), head, path, manifest.rows(data.split))
    size = max(1, len(manifest.label_names)) * data.labels_per_class * Layout.of(manifest).width
    if size > MOST_BYTES:
        raise FigmentError(
            f"--data.labels-per-class {data.labels_per_class} makes {size / 1e9:.1f} GB of labelled images, which every"
            f" worker would hold in memory: {MOST_BYTES / 1e9:.1f} GB is the most; choose fewer"
        )
    labels = _labels(fs, manifest, data.split)
    rows = rows_by_class(labels, data.labels_per_class, data.labels_seed, manifest.label_names)
    write_json(fs, path, {**head, "rows": {str(label): found for label, found in rows.items()}})
    return rows


def load_subset(fs: pafs.FileSystem, folder: str, manifest: Manifest, data: DataSpec) -> LabelledSubset:
    """The subset of the run in `folder`. `FigmentError` for a shard that is missing, damaged or labelled otherwise."""
    chosen = choose_subset(fs, folder, manifest, data)
    labels = np.concatenate([np.full(len(rows), label, np.int64) for label, rows in chosen.items()])
    rows = np.concatenate([np.asarray(rows, np.int64) for rows in chosen.values()])
    layout = Layout.of(manifest)
    images = np.empty((len(rows), *manifest.image_shape), np.uint8)
    first = 0
    for shard in manifest.shards(data.split):
        inside = np.flatnonzero((rows >= first) & (rows < first + shard.rows))
        if len(inside):
            pixels, found = read_rows(fs, layout, shard, rows[inside] - first)
            if (found != labels[inside]).any():
                raise FigmentError(
                    f"{folder}/labelled.json gives other labels than shard {layout.root}/{shard.path}: it was changed;"
                    " choose another --name"
                )
            images[inside] = pixels.reshape(-1, *manifest.image_shape)
        first += shard.rows
    return LabelledSubset(images, labels, data.labels_seed)


def _stored(data: bytes, head: dict[str, Any], path: str, of: int) -> dict[int, list[int]]:
    """The rows in a labelled.json, of a split of `of` rows."""
    try:
        body = json.loads(data)
        if {key: body[key] for key in head} == head:
            chosen = {int(label): [int(row) for row in rows] for label, rows in body["rows"].items()}
            every = [row for rows in chosen.values() for row in rows]
            if len(set(every)) < len(every) or not every or not 0 <= min(every) <= max(every) < of:
                raise ValueError(f"its rows are not different ones of {of:,}")
            return chosen
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FigmentError(f"{path} cannot be read ({error!r}): remove it, and it is made again") from error
    raise FigmentError(f"{path} is of another labelled subset than this run's: remove it, and it is made again")


def _labels(fs: pafs.FileSystem, manifest: Manifest, split: str) -> np.ndarray:
    """int (N,), of all rows of the split in stored order.

    Only the label columns are fetched, so no sum of a shard is checked here: `read_rows` does that for those that hold
    a row of the subset.
    """

    def read(shard: Shard) -> np.ndarray:
        path = f"{manifest.root}/{shard.path}"
        try:
            with fs.open_input_file(path) as file:
                labels = pq.ParquetFile(file).read(columns=["label"], use_threads=False)["label"].to_numpy()
        except (FileNotFoundError, pa.ArrowException) as error:
            raise FigmentError(f"shard {path} of data set {manifest.name!r} has no readable labels: {error}") from error
        if len(labels) != shard.rows:
            raise FigmentError(f"shard {path} of data set {manifest.name!r} has {len(labels)} rows, not {shard.rows}")
        return labels

    with ThreadPoolExecutor(_READERS, "figment-labels") as pool:
        return np.concatenate([*pool.map(read, manifest.shards(split))])
