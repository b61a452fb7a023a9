"""How near an ingest comes to bare decoding on every core: `python -m benchmarks.ingest ILSVRC2012_img_train.tar`.

The archive is one of ImageNet's layout: a tar of one tar of JPEGs a class. A small one is made larger first: its images
are repeated, each with a comment of its own, under new names and in the classes that they have; `--side` resizes them,
for the images of ImageNet have a shorter side of about 375 pixels. The larger archive is kept in `--scratch`.

For each size, in alternating repetitions on the same files, on an otherwise idle machine:

- `ingest`: the whole pipeline from the archive to shards in a folder; Ray runs already, with its workers;
- `bare`: a loop of Pillow in one process over every n-th of these files, in memory: decode, crop, resize, with
  the same reduced decoding of large JPEGs as the ingest has, which resizes by torch. `bare_full` decodes them whole,
  `bare_encoded` also encodes as the shards are encoded;
- `reader`: the archive read and its images counted, by the driver alone.

The ratios are images/s of the ingest ÷ (cores × images/s of a loop), medians over the repetitions. `cpu_us` is what is
computed for one image, in microseconds: by the driver (a thread for the archive, others that write shards), by the
workers, by Ray's own processes, and by the bare loop; `cpu_ratio` is the bare loop's ÷ the sum of the others', which is
the ratio that would be without other load and without waiting. `imagenet_hours` is what 1,281,167 such images take on
`n` cores as fast as these, the driver's among them, until the driver has no more time. Runs on a Ray of its own.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import ray
import tyro
from PIL import Image
from pyarrow import fs as pafs

from benchmarks.encodings import jpeg_of_side
from infra.storage import StorageError, open_source, open_storage
from pipelines.data.images import ENCODERS, REDUCED, prepare
from pipelines.data.ingest import ingest
from pipelines.data.ingest_options import IngestOptions, plan_layout
from pipelines.data.sources import read_images
from pipelines.data.sources_io import EncodedImage, Source
from pipelines.errors import FigmentError

IMAGENET = 1_281_167
CORES = (2, 16, 128)


@dataclass(frozen=True)
class Settings:
    """Compare an ingest with a bare loop of Pillow."""

    archive: Annotated[str, tyro.conf.Positional]
    """ILSVRC2012_img_train.tar, or part of it in the same layout."""
    images: int = 6_000
    """How many there are to be at least; those of the archive are repeated."""
    side: int | None = None
    """Shorter side in pixels that they are brought to first. Default: they stay as they are."""
    sizes: tuple[int, ...] = (64, 128)
    encoding: str = "auto"
    repetitions: int = 5
    bare_images: int = 1_500
    scratch: Path | None = None
    """Folder that keeps the larger archive. Default: one that is deleted at the end."""


# --- the archive ------------------------------------------------------------------------------------------------------


def enlarged(settings: Settings, folder: Path) -> Path:
    """An archive of at least `settings.images` JPEGs, made of those of the given one."""
    source = Source(*open_source(settings.archive), name=settings.archive)
    info = source.fs.get_file_info(source.path)
    path = folder / f"images-{settings.images}-{settings.side or 'as-is'}-{info.size}.tar"
    if path.exists():
        return path
    classes: dict[str, list[bytes]] = defaultdict(list)
    for image in read_images(source, "imagenet-train"):
        if isinstance(image, EncodedImage):
            data = bytes(image.data) if settings.side is None else jpeg_of_side(bytes(image.data), settings.side)
            classes[image.member.partition(".tar/")[0]].append(data)
    copies = -(-settings.images // sum(map(len, classes.values())))
    unfinished = path.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as outer:
        for synset, files in classes.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in range(copies * len(files)):
                    _add(tar, f"{synset}_{number}.JPEG", _with_comment(files[number % len(files)], str(number)))
            _add(outer, f"{synset}.tar", inner.getvalue())
    return unfinished.rename(path)


def _with_comment(data: bytes, text: str) -> bytes:
    """A JPEG of other bytes and the same pixels: a comment follows its first two bytes."""
    return data[:2] + b"\xff\xfe" + (2 + len(text)).to_bytes(2, "big") + text.encode() + data[2:]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# --- measurements -----------------------------------------------------------------------------------------------------


def bare(files: list[bytes], size: int, *, reduced: bool = True, encoding: str = "raw") -> float:
    """images/s of plain Pillow."""
    began = time.perf_counter()
    for data in files:
        picture = Image.open(io.BytesIO(data))
        if reduced:
            picture.draft(None, (REDUCED * size, REDUCED * size))
        rgb = picture.convert("RGB")
        width, height = rgb.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        small = rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        if encoding != "raw":
            small.save(io.BytesIO(), encoding.upper(), **ENCODERS[encoding])
    return len(files) / (time.perf_counter() - began)


def read_only(archive: Path) -> float:
    """images/s of reading the archive."""
    began = time.perf_counter()
    images = sum(1 for _ in read_images(_source(archive), "imagenet-train"))
    return images / (time.perf_counter() - began)


def whole_ingest(archive: Path, size: int, encoding: str) -> tuple[float, dict[str, float]]:
    """(images/s, microseconds computed an image by driver, workers and Ray)."""
    with tempfile.TemporaryDirectory(prefix="figment-ingest-") as store:
        options = IngestOptions("benchmark", size=size, encoding=encoding)  # type: ignore[arg-type]
        before = _computed()
        result = ingest(_source(archive), open_storage(store), options)
        after = _computed()
    return result.images / result.seconds, {who: (after[who] - before[who]) / result.images * 1e6 for who in after}


def _computed() -> dict[str, float]:
    """Seconds so far of this process and of those that Ray has started."""
    spent = {"driver": time.process_time(), "workers": 0.0, "ray": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            times, name = process.cpu_times(), "".join(process.cmdline()[:1])
        except psutil.NoSuchProcess:
            continue
        spent["workers" if name.startswith("ray::") else "ray"] += times.user + times.system
    return spent


def _source(archive: Path) -> Source:
    return Source(pafs.LocalFileSystem(), str(archive), archive.name)


def measure(archive: Path, files: list[bytes], size: int, settings: Settings) -> dict[str, Any]:
    options = IngestOptions("benchmark", size=size, encoding=settings.encoding)  # type: ignore[arg-type]
    layout, images = plan_layout(_source(archive), options)
    images.close()
    runs: dict[str, Callable[[], float]] = {
        "reader": lambda: read_only(archive),
        "bare": lambda: bare(files, size),
        "bare_full": lambda: bare(files, size, reduced=False),
        "bare_encoded": lambda: bare(files, size, encoding=layout.encoding),
    }
    found: dict[str, list[float]] = defaultdict(list)
    cpu_us: dict[str, list[float]] = defaultdict(list)
    for repetition in range(settings.repetitions):
        images_per_s, computed = whole_ingest(archive, size, settings.encoding)
        found["ingest"].append(images_per_s)
        for name, run in runs.items():
            began = time.process_time()
            found[name].append(run())
            if name == "bare":
                computed["bare"] = (time.process_time() - began) / len(files) * 1e6
        for who, us in computed.items():
            cpu_us[who].append(us)
        said = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in (*found.items(), *cpu_us.items()))
        print(f"  {size} pixels, {repetition + 1}/{settings.repetitions}: {said}", flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    cpu = {who: statistics.median(values) for who, values in cpu_us.items()}
    cores = os.cpu_count() or 1
    others = cpu["driver"] + cpu["workers"] + cpu["ray"]
    hours = {str(n): IMAGENET * max(others / n, cpu["driver"]) / 3.6e9 for n in CORES}
    return {
        "encoding": layout.encoding,
        "ratio_vs_bare": round(_ratio(found["ingest"], found["bare"]) / cores, 3),
        "ratio_vs_bare_full": round(_ratio(found["ingest"], found["bare_full"]) / cores, 3),
        "ratio_vs_bare_with_encode": round(_ratio(found["ingest"], found["bare_encoded"]) / cores, 3),
        "images_per_s": {name: round(medians[name]) for name in ("ingest", *runs)},
        "cpu_ratio": round(cpu["bare"] / others, 3),
        "cpu_us": {who: round(us) for who, us in cpu.items()},
        "imagenet_hours": {n: round(value, 2) for n, value in hours.items()},
    }


def _ratio(ours: list[float], yardstick: list[float]) -> float:
    """The median of the ratios of neighbouring repetitions: what else the machine does weighs on both alike."""
    return statistics.median(a / b for a, b in zip(ours, yardstick, strict=True))


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="figment-archive-") as temporary:
            yield Path(temporary)


def _start_ray(files: list[bytes]) -> float:
    """Seconds until Ray runs and every core has a worker that has decoded."""
    began = time.perf_counter()
    ray.init(address="local", log_to_driver=False, object_store_memory=2**30, include_dashboard=False)
    task = ray.remote(prepare)
    images = [EncodedImage("train", data, 0, "") for data in files[:100]]
    ray.get([task.remote(images, 64, "raw") for _ in range(4 * int(ray.cluster_resources()["CPU"]))])
    return time.perf_counter() - began


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks.ingest")
    with _scratch(settings.scratch) as folder:
        archive = enlarged(settings, folder)
        all_files = [
            bytes(i.data) for i in read_images(_source(archive), "imagenet-train") if isinstance(i, EncodedImage)
        ]
        files = all_files[:: -(-len(all_files) // settings.bare_images)]
        about = {
            "benchmark": "ingest",
            "images": len(all_files),
            "bare_images": len(files),
            "kb_per_image": round(sum(map(len, all_files)) / len(all_files) / 1e3, 1),
            "shorter_side": statistics.median(min(Image.open(io.BytesIO(data)).size) for data in files),
            "cores": os.cpu_count(),
            "repetitions": settings.repetitions,
        }
        del all_files
        started = _start_ray(files)
        result = {str(size): measure(archive, files, size, settings) for size in settings.sizes}
        ray.shutdown()
    print(json.dumps(about | {"ray_start_s": round(started, 1), "sizes": result}))


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        main()
    except (FigmentError, StorageError) as error:
        sys.exit(f"error: {error}")
