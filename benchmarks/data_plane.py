"""How fast images reach one training worker, and what memory that takes: `python -m benchmarks.data_plane`.

Side by side, in one process (a Ray actor, as a training worker is) and in alternating repetitions on the same shards:

- the stream: `training_batches` as training uses it; a fresh stream each time, its first epoch as warm-up, then
  `--epochs` epochs without a pause against the clock;
- bare pyarrow: `pyarrow.parquet.read_table` of the same shards over the same filesystem, `--epochs` passes. For
  encoded images instead bare decoding: as many processes as cores read the same shards and decode them with Pillow
  (`bare_decode.py`). Let a small data set pass often (`--epochs 20`), or what was read ahead at the start weighs;
- a `torch.utils.data.DataLoader` with 2 workers over the same images as PNG files on the local disk, one pass, from the
  arrival of its first batch on.

`peak_rss_growth` is peak memory with a manifest that lists every shard four times ÷ peak memory with the manifest as it
is. The same number of rows (four epochs of the short one) is read, with pauses, in which the stream reads ahead as far
as it ever will. Memory is sampled 20 times a second as the sum of what is private (USS) to the consumer and to every
Ray worker process of this machine (the data tasks), and of the bytes in the object store. Each run has a consumer of
its own. Runs on the cluster of RAY_ADDRESS, else on one that it starts; the data set must be in the store.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import torch
import tyro
from PIL import Image
from pyarrow import fs as pafs
from torch.utils.data import DataLoader, Dataset

from benchmarks.bare_decode import BareDecode
from infra.storage import StorageError, default_store, open_storage
from pipelines.data.manifest import Manifest, load_manifest
from pipelines.data.plan import Cursor
from pipelines.data.stream import BatchStream, evaluation_batches, training_batches
from pipelines.errors import FigmentError
from pipelines.ray_private import object_store_bytes

TIMES_LONGER = 4
LOADER_WORKERS = 2


@dataclass(frozen=True)
class Settings:
    """Compare the data stream with bare reading or decoding and with a PyTorch DataLoader, and watch its memory."""

    dataset: str = "cifar10"
    """Data set in the store: NAME or NAME@VERSION."""
    split: str = "train"
    store: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: $FIGMENT_STORE)")] = None
    """s3://bucket/prefix or a folder."""
    repetitions: int = 7
    epochs: int = 3
    """Passes over the data set a measurement."""
    memory_runs: int = 3
    """Pairs of runs for `peak_rss_growth`."""
    batch_size: int = 256
    shuffle_shards: int = 8


@ray.remote(num_cpus=1)
class Worker:
    """Stands in for one training worker."""

    def __init__(self, fs: pafs.FileSystem, manifest: Manifest, settings: Settings) -> None:
        self.fs, self.manifest, self.settings = fs, manifest, settings
        self.rows = manifest.rows(settings.split)

    def pid(self) -> int:
        return os.getpid()

    def stream(self, seed: int) -> tuple[float, float]:
        """(images/s, seconds to the first batch)."""
        began = time.perf_counter()
        with self._batches(seed) as batches:
            next(batches)
            first = time.perf_counter() - began
            _consume(batches, self.rows)
            began = time.perf_counter()
            images = _consume(batches, self.settings.epochs * self.rows)
            return images / (time.perf_counter() - began), first

    def bare(self) -> float:
        """images/s of bare pyarrow."""
        began, images = time.perf_counter(), 0
        for _ in range(self.settings.epochs):
            for shard in self.manifest.shards(self.settings.split):
                images += pq.read_table(f"{self.manifest.root}/{shard.path}", filesystem=self.fs).num_rows
        return images / (time.perf_counter() - began)

    def write_files(self, folder: Path) -> None:
        """Every image as one PNG file; files of the same label share a folder."""
        batches = evaluation_batches(
            self.fs, self.manifest, self.settings.split, world_size=1, rank=0, batch_size=self.settings.batch_size
        )
        row = 0
        for images, labels, _ in batches:
            for image, label in zip(images, labels.tolist(), strict=True):
                path = folder / str(label) / f"{row}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(path)
                row += 1

    def loader(self, folder: Path) -> float:
        """images/s of a DataLoader, its workers' start not counted."""
        loader = DataLoader(
            _Files(folder), batch_size=self.settings.batch_size, shuffle=True, num_workers=LOADER_WORKERS
        )
        batches = iter(loader)
        next(batches)
        began = time.perf_counter()
        images = sum(len(labels) for _, labels in batches)
        return images / (time.perf_counter() - began)

    def read_with_pauses(self, rows: int) -> None:
        """Quarter by quarter, with a pause before each that lets the stream read ahead as far as it will."""
        with self._batches(seed=0) as batches:
            for _ in range(4):
                next(batches)
                time.sleep(1.5)
                _consume(batches, rows // 4)

    def _batches(self, seed: int) -> BatchStream:
        return training_batches(
            self.fs,
            self.manifest,
            self.settings.split,
            seed=seed,
            shuffle_shards=self.settings.shuffle_shards,
            cursor=Cursor.start(1),
            rank=0,
            batch_size=self.settings.batch_size,
        )


class _Files(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, folder: Path) -> None:
        self.files = [(str(path), int(path.parent.name)) for path in sorted(folder.glob("*/*.png"))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[row]
        with Image.open(path) as image:
            pixels = np.array(image)
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), label


def _consume(batches: BatchStream, rows: int) -> int:
    seen = 0
    while seen < rows:
        seen += len(next(batches)[1])
    return seen


@contextmanager
def _peak_memory(worker: Any) -> Iterator[Callable[[], int]]:
    """Samples memory until the end of the block; the value then gives the peak in bytes."""
    raylet = psutil.Process(ray.get(worker.pid.remote())).parent()
    assert raylet is not None
    address = ray.get_runtime_context().gcs_address
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.05):
            private = 0
            for process in raylet.children():
                try:
                    if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                        private += process.memory_full_info().uss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, private + object_store_bytes(address))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        thread.join()


def measure_speed(fs: pafs.FileSystem, manifest: Manifest, settings: Settings) -> dict[str, Any]:
    worker = Worker.remote(fs, manifest, settings)  # type: ignore[attr-defined]
    raw = manifest.encoding == "raw"
    yardstick = "pyarrow" if raw else "bare_decode"
    found: dict[str, list[float]] = {"stream": [], yardstick: [], "dataloader": [], "first_batch_s": []}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="figment-png-")))

        decoders = None if raw else stack.enter_context(BareDecode(fs, manifest, settings.split))

        def bare() -> float:
            return ray.get(worker.bare.remote()) if decoders is None else decoders.images_per_s(settings.epochs)

        ray.get(worker.write_files.remote(scratch))
        ray.get([worker.stream.remote(0), worker.loader.remote(scratch)])  # warm
        bare()
        for repetition in range(settings.repetitions):
            images_per_s, first = ray.get(worker.stream.remote(repetition))
            found["stream"].append(images_per_s)
            found["first_batch_s"].append(first)
            found[yardstick].append(bare())
            found["dataloader"].append(ray.get(worker.loader.remote(scratch)))
            print(
                f"  {repetition + 1}/{settings.repetitions}: stream {images_per_s:,.0f} images/s (first batch after"
                f" {first:.2f} s), {yardstick} {found[yardstick][-1]:,.0f}, DataLoader {found['dataloader'][-1]:,.0f}",
                flush=True,
            )
    ray.kill(worker)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        f"ratio_vs_{yardstick}": round(_ratio(found["stream"], found[yardstick]), 3),
        "ratio_vs_dataloader": round(_ratio(found["stream"], found["dataloader"]), 3),
        "images_per_s": {name: round(medians[name]) for name in ("stream", yardstick, "dataloader")},
        "first_batch_s": round(medians["first_batch_s"], 2),
    }


def measure_memory(fs: pafs.FileSystem, manifest: Manifest, settings: Settings) -> dict[str, Any]:
    shards = manifest.shards(settings.split)
    longer = replace(manifest, splits={settings.split: shards * TIMES_LONGER})
    rows = TIMES_LONGER * manifest.rows(settings.split)
    peaks: dict[int, list[float]] = {1: [], TIMES_LONGER: []}
    for run in range(settings.memory_runs):
        for times, data in ((1, manifest), (TIMES_LONGER, longer)):
            worker = Worker.remote(fs, data, settings)  # type: ignore[attr-defined]
            with _peak_memory(worker) as peak:
                ray.get(worker.read_with_pauses.remote(rows))
            ray.kill(worker)
            peaks[times].append(peak())
            print(f"  {run + 1}/{settings.memory_runs}: data set x{times}, peak {peak() / 2**20:,.0f} MiB", flush=True)
    return {
        "peak_rss_growth": round(_ratio(peaks[TIMES_LONGER], peaks[1]), 3),
        "peak_mib": {f"x{times}": round(statistics.median(values) / 2**20) for times, values in peaks.items()},
    }


def _ratio(ours: list[float], yardstick: list[float]) -> float:
    """The median of the ratios of neighbouring repetitions: what else the machine does weighs on both alike."""
    return statistics.median(a / b for a, b in zip(ours, yardstick, strict=True))


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks.data_plane")
    store = settings.store or default_store()
    if store is None:
        raise FigmentError("no storage is named: give --store URL or set FIGMENT_STORE")
    fs = open_storage(store)
    manifest = load_manifest(fs, settings.dataset)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(address="local", log_to_driver=False, object_store_memory=2**30)
    rows = manifest.rows(settings.split)
    print(
        f"{rows:,} images of {manifest.name}@{manifest.version}, {len(manifest.shards(settings.split))} shards, {store}"
    )
    result = measure_speed(fs, manifest, settings) | measure_memory(fs, manifest, settings)
    about = {
        "benchmark": "data_plane",
        "dataset": f"{manifest.name}@{manifest.version}",
        "split": settings.split,
        "rows": rows,
        "shards": len(manifest.shards(settings.split)),
        "image_shape": manifest.image_shape,
        "encoding": manifest.encoding,
        "store": store.partition("://")[0],
        "cores": os.cpu_count(),
        "repetitions": settings.repetitions,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "shuffle_shards": settings.shuffle_shards,
        "dataloader_workers": LOADER_WORKERS,
    }
    ray.shutdown()
    print(json.dumps(about | result))


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        main()
    except (FigmentError, StorageError) as error:
        sys.exit(f"error: {error}")
