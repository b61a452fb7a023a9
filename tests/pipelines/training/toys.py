"""Small real data sets and specs for the training tests."""

from __future__ import annotations

import numpy as np
from pyarrow import fs as pafs

from pipelines.config import ClusterSpec, DataSpec, RunSpec, TrainingSpec, VisualsSpec
from pipelines.data.manifest import Manifest, Shard, save_manifest
from tests.models.cases import CASES
from tests.pipelines.data.shards import write_shard

DATASET = "toy"


def toy_dataset(
    fs: pafs.FileSystem, shape: tuple[int, int, int] = (1, 8, 8), train: int = 70, test: int = 30
) -> Manifest:
    """Two kinds of image, a bright left half and a bright top half, with a little noise."""

    def shards(rows: int, seed: int) -> tuple[Shard, ...]:
        rng = np.random.default_rng(seed)
        labels = np.arange(rows, dtype=np.int32) % 2
        images = rng.integers(0, 60, (rows, *shape), dtype=np.uint8)
        images[labels == 0, :, :, : shape[2] // 2] += 180
        images[labels == 1, :, : shape[1] // 2] += 180
        parts = [slice(i, i + 25) for i in range(0, rows, 25)]
        return tuple(write_shard(fs, f"datasets/{DATASET}", images[p], labels[p]) for p in parts)

    manifest = Manifest(
        name=DATASET,
        splits={"train": shards(train, 1), "test": shards(test, 2)},
        image_shape=shape,
        encoding="raw",
        label_names=("left", "top"),
        channel_mean=(100.0,) * shape[0],
        source={"format": "made by the tests"},
        created_at="2026-01-01T00:00:00+00:00",
    )
    save_manifest(fs, manifest)
    return manifest


def toy_spec(
    model: str, *, images: int = 240, workers: int = 1, checkpoint_every: int = 10**9, seed: int = 3
) -> RunSpec:
    return RunSpec(
        recipe=f"{model}-toy",
        model=CASES[model].config,
        data=DataSpec(dataset=DATASET, shuffle_shards=2, prefetch_batches=2),
        training=TrainingSpec(
            images=images,
            batch_size=20,
            seed=seed,
            ema_half_life=60,
            log_every=60,
            evaluate_every=120,
            checkpoint_every=checkpoint_every,
        ),
        visuals=VisualsSpec(grid=3, frames=4),
        cluster=ClusterSpec(workers=workers, cpus_per_worker=0.5),
    )
