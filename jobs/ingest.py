"""Turns an official image archive into a data set version in storage.

    python -m jobs.ingest cifar-10-binary.tar.gz --dataset-name cifar10
    python -m jobs.ingest s3://archives/ILSVRC2012_img_train.tar s3://bucket/figment --dataset-name imagenet64 --size 64

The version becomes visible when it is complete. Repeating a finished ingest writes nothing; repeating one that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from infra.storage import StorageError, default_store, explain, open_source, open_storage, redact
from jobs.entry import connect_ray, run_job
from pipelines.data.ingest import IngestResult, Progress, ingest
from pipelines.data.ingest_options import IngestOptions, plan_layout
from pipelines.data.sources import FORMATS
from pipelines.data.sources_io import Limits, Source
from pipelines.errors import FigmentError

LOG_EVERY_S = 10.0  # a line of its own, where there is no terminal to overwrite one


FORMAT_HELP = (
    f"Format of the source: auto (looks inside), {', '.join(FORMATS)}."
    " folders: CLASS/x.png or {train,test,val}/CLASS/x.png."
)


@dataclass(frozen=True)
class IngestJob:
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Archive or folder to read: a local path, https://… or s3://…; IDX: the folder, or one of the images files."""
    dest: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DEST]")] = None
    """Storage to write to: s3://bucket/prefix, file:///folder or a plain folder. Default: $FIGMENT_STORE."""
    dataset_name: str = tyro.MISSING
    """Name of the data set; it is found later under this name, or as NAME@VERSION."""
    format: Annotated[str, tyro.conf.arg(help=FORMAT_HELP)] = "auto"
    size: int | None = None
    """Side of the stored images in pixels: shorter side to this size, then a centre crop (32, 64, 128, 256).
    Default: 64 for image files; CIFAR-10 and IDX keep their own."""
    encoding: Literal["auto", "raw", "png", "jpeg", "webp"] = "auto"
    """How images are stored; auto: raw pixels up to 64x64, else webp. Only jpeg (quality 95) loses something."""
    rows_per_shard: int | None = None
    """Images a shard. Default: as many as make about 8 MB, 16 at least and 4,096 at most."""
    mix_shards: int = 64
    """Shards open at the same time: more mix an archive that is sorted by class better. They are fewer where open
    shards and those being written could hold more than 600 MB."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What to do with an image that cannot be decoded; skip counts and names such images in the manifest."""
    max_file_mb: int = 64
    """Size of an image file, or of a pickle, that is still read, in MB; a larger image is a bad image."""
    max_megapixels: int = 100
    """Pixels of an image that is still decoded, in millions; a larger one is a bad image. Decoding takes 4 to 6 bytes
    a pixel, on as many images at once as the cluster has CPUs."""
    max_ratio: int = 200
    """How many times its own size a compressed archive may unpack to (1 GB it always may), and an image file may
    become in pixels (64 MB it always may). ImageNet, CIFAR and MNIST are far within all three."""
    val_labels: str | None = None
    """Ground truth of ILSVRC2012_img_val.tar: a line an image, WordNet id or number 1 … 1000; without: unlabelled."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say what would be done, after a look at the source, and write nothing."""


def main() -> None:
    job = tyro.cli(IngestJob, prog="python -m jobs.ingest", description=__doc__)
    run_job(lambda: run(job))


def run(job: IngestJob) -> None:
    options = IngestOptions(
        dataset_name=job.dataset_name,
        format=job.format,
        size=job.size,
        encoding=job.encoding,
        rows_per_shard=job.rows_per_shard,
        on_bad_image=job.on_bad_image,
        mix_shards=job.mix_shards,
    )
    dest = job.dest or default_store()
    if dest is None:
        raise FigmentError("no storage to write to: name it after the source (s3://bucket/prefix) or set FIGMENT_STORE")
    source = _source(job)
    if job.dry_run:
        _print_plan(source, options, dest)
        return
    line = _LiveLine()
    try:
        result = ingest(source, open_storage(dest), options, connect=connect_ray, on_progress=line.show)
    except OSError as error:  # of the storage: what the source raises is worded where it is read
        raise StorageError(explain(error, dest)) from error
    finally:
        line.end()
    _print_result(result, dest)


def _source(job: IngestJob) -> Source:
    fs, path = open_source(job.source)
    name = redact(job.source) if "://" in job.source else path
    limits = Limits(job.max_file_mb * 10**6, job.max_megapixels * 10**6, job.max_ratio)
    if job.val_labels is None:
        return Source(fs, path, name, limits=limits)
    labels_fs, labels_path = open_source(job.val_labels)
    try:
        with labels_fs.open_input_stream(labels_path) as stream:
            lines = bytes(stream.read()).decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise StorageError(explain(error, job.val_labels)) from error
    while lines and not lines[-1].strip():
        lines.pop()
    return Source(fs, path, name, tuple(line.strip() for line in lines), redact(job.val_labels), limits)


def _print_plan(source: Source, options: IngestOptions, dest: str) -> None:
    layout, images = plan_layout(source, options)
    images.close()
    channels, height, width = layout.image_shape
    print(f"source          {source.name}")
    print(f"format          {layout.format}")
    print(f"data set        {options.dataset_name} in {redact(dest)}")
    print(f"images          {channels} x {height} x {width}, stored as {layout.encoding}")
    print(f"rows per shard  {layout.rows_per_shard:,}")
    print(f"open shards     {layout.open_shards:,}, up to {layout.held_bytes / 1e6:,.0f} MB in memory")
    print(f"bad images      {options.on_bad_image}")
    print("dry run: nothing was written")


def _print_result(result: IngestResult, dest: str) -> None:
    manifest = result.manifest
    for split, shards in sorted(manifest.splits.items(), reverse=True):
        rows, size = sum(shard.rows for shard in shards), sum(shard.bytes for shard in shards)
        print(f"{split:<10} {rows:>12,} rows  {len(shards):>6,} shards  {size:>16,} bytes")
    if manifest.skipped.count:
        print(f"skipped    {manifest.skipped.count:>12,} images, the first: {manifest.skipped.members[0]}")
    if result.images:
        kept = result.images - result.prepared
        print(
            f"{result.images:,} images in {result.seconds:.1f} s, {result.images / result.seconds:,.0f} images/s"
            + (f"; {kept:,} of them were kept from an interrupted run" if kept else "")
        )
    print(f"{'already there:' if result.already_there else 'complete:'} {manifest.name}@{manifest.version}")
    print(f"manifest   {redact(dest).rstrip('/')}/{result.path}", flush=True)


class _LiveLine:
    """Progress on one line that is overwritten, or, without a terminal, on a line of its own now and then."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._before: Progress | None = None

    def show(self, progress: Progress) -> None:
        before = self._before or Progress(0, 0, 0, 0, None, 0.0)
        if not self._live and self._before and progress.seconds - before.seconds < LOG_EVERY_S:
            return
        if progress.images < 2:  # Ray is still starting: no speed to tell yet
            return
        self._before = progress
        speed = (progress.images - before.images) / max(progress.seconds - before.seconds, 1e-9)
        text = f"{progress.images:,} images  {speed:,.0f} images/s  {progress.shards:,} shards"
        if progress.skipped:
            text += f"  {progress.skipped:,} skipped"
        if progress.bytes_total:
            share = min(progress.bytes_read / progress.bytes_total, 1.0)
            text += f"  {share:.0%} of {progress.bytes_total / 1e6:,.1f} MB read"
            if 0 < share < 1:
                text += f"  ETA {progress.seconds * (1 - share) / share:,.0f} s"
        print(f"\r\033[K{text}" if self._live else text, end="" if self._live else "\n", flush=True)

    def end(self) -> None:
        if self._live and self._before:
            print()


if __name__ == "__main__":
    main()
