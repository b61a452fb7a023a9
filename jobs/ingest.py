"""Turns an official image archive into a data set version in storage.

    python -m jobs.ingest mnist
    python -m jobs.ingest cifar-10-binary.tar.gz --dataset-name cifar10
    python -m jobs.ingest s3://archives/ILSVRC2012_img_train.tar s3://bucket/figment --dataset-name imagenet64 --size 64

The version becomes visible when it is complete. Repeating a finished ingest writes nothing; repeating one that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from infra.storage import (
    StorageError,
    cache_folder,
    default_store,
    explain,
    local_path,
    open_source,
    open_storage,
    redact,
)
from jobs.entry import connect_ray, run_job
from pipelines.data.download import PublishedFile
from pipelines.data.ingest import IngestResult, Progress, ingest, ingested
from pipelines.data.ingest_options import IngestOptions, Layout, ingest_key, plan_layout
from pipelines.data.known import KNOWN, Known, download, nearest
from pipelines.data.sources import FORMATS
from pipelines.data.sources_io import Limits, Source
from pipelines.errors import FigmentError

LOG_EVERY_S = 5.0  # a line of its own, where there is no terminal to overwrite one

SOURCE_HELP = (
    "Archive or folder to read: a local path, https://… or s3://…; IDX, SVHN, CelebA: the folder, or one of its files."
    f" Or a data set known by name, which is downloaded to $FIGMENT_CACHE"
    f" (default: ~/.cache/figment): {', '.join(KNOWN)}."
)

FORMAT_HELP = (
    f"Format of the source: auto (looks inside), {', '.join(FORMATS)}."
    " folders: CLASS/x.png or {train,test,val}/CLASS/x.png. arrays: an .npz file as data/render_heads.py writes it."
    " svhn: {train,test,extra}_32x32.mat, those that are there. celeba: img_align_celeba.zip with list_attr_celeba.txt"
    " and list_eval_partition.txt."
)


@dataclass(frozen=True)
class IngestJob:
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help=SOURCE_HELP)]
    dest: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DEST]")] = None
    """Storage to write to: s3://bucket/prefix, file:///folder or a plain folder. Default: $FIGMENT_STORE."""
    dataset_name: str | None = None
    """Name of the data set; it is found later under this name, or as NAME@VERSION. Default: that of a data set known by
    name; for any other source it must be given."""
    format: Annotated[str, tyro.conf.arg(help=FORMAT_HELP)] = "auto"
    size: int | None = None
    """Side of the stored images in pixels: shorter side to this size, then a centre crop (32, 64, 128, 256).
    Default: 64 for image files; CIFAR, SVHN and IDX keep their own."""
    crop: int | None = None
    """Side in pixels of the source of a square that is cut from the middle first, and then resized. Default: 108 for
    CelebA (--crop 178 takes its whole width), else as large as the image has room for. A smaller image is a bad one."""
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
    become in pixels (64 MB it always may). ImageNet, CIFAR, SVHN and MNIST are far within all three."""
    val_labels: str | None = None
    """Ground truth of ILSVRC2012_img_val.tar: a line an image, WordNet id or number 1 … 1000; without: unlabelled."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say what would be done, after a look at the source, and write nothing."""


def main(known: Mapping[str, Known] = KNOWN) -> None:
    job = tyro.cli(IngestJob, prog="python -m jobs.ingest", description=__doc__)
    run_job(lambda: run(job, known))


def run(job: IngestJob, known: Mapping[str, Known] = KNOWN) -> None:
    carry_out(job, _known(job, known))


def carry_out(job: IngestJob, by_name: Known | None, called: str | None = None) -> None:
    """The job of a data set known `by_name`, else of its source, which the manifest is told to be `called` so."""
    options = IngestOptions(
        dataset_name=job.dataset_name or (by_name.name if by_name else ""),
        format=by_name.format if by_name else job.format,
        size=job.size,
        crop=job.crop,
        encoding=job.encoding,
        rows_per_shard=job.rows_per_shard,
        on_bad_image=job.on_bad_image,
        mix_shards=job.mix_shards,
    )
    dest = job.dest or default_store()
    if dest is None:
        raise FigmentError("no storage to write to: name it after the source (s3://bucket/prefix) or set FIGMENT_STORE")
    limits = Limits(job.max_file_mb * 10**6, job.max_megapixels * 10**6, job.max_ratio)
    source = by_name.source(cache_folder(), limits) if by_name else _source(job, limits, called)
    if job.dry_run:
        layout = by_name.layout(options) if by_name else _layout(source, options)
        _print_plan(source, layout, options, dest, _download_plan(by_name) if by_name else "")
        return
    line = _LiveLine()
    try:
        fs = open_storage(dest)
        done = (
            ingested(fs, options.dataset_name, ingest_key(source, options, by_name.layout(options)))
            if by_name
            else None
        )
        if by_name and not done:
            _download(by_name)
        result = done or ingest(source, fs, options, connect=connect_ray, on_progress=line.show)
    except OSError as error:  # of the storage: what the source raises is worded where it is read
        raise StorageError(explain(error, dest)) from error
    finally:
        line.end()
    _print_result(result, dest)


def _known(job: IngestJob, known: Mapping[str, Known]) -> Known | None:
    """The data set that is meant by name. A file or folder of that name goes before it."""
    if "/" in job.source or local_path(job.source).exists():
        if job.dataset_name is None:
            hint = " (the file or folder here is meant, not the data set known by that name)"
            raise FigmentError(
                f"{redact(job.source)} needs --dataset-name, to be found by later{hint if job.source in known else ''}"
            )
        return None
    found = known.get(job.source)
    if found is None:
        near = nearest(job.source, known)
        raise FigmentError(
            f"there is no file or folder {job.source!r}, and no data set is known by that name"
            f" ({', '.join(known)}){f'; did you mean {near!r}?' if near else ''}"
        )
    if job.format not in ("auto", found.format) or job.val_labels:
        raise FigmentError(f"{found.name} is known to have format {found.format}: leave out --format and --val-labels")
    return found


def _download_plan(known: Known) -> str:
    missing = known.missing(cache_folder())
    if not missing:
        return f"nothing: {known.folder(cache_folder())} has it all"
    size = sum(file.bytes for file in missing)
    return f"{size / 1e6:,.1f} MB from {missing[0].urls[0]} … to {known.folder(cache_folder())}"


def _download(known: Known) -> None:
    cache, line = cache_folder(), _DownloadLine()
    if not known.missing(cache):
        print(f"{known.name} lies in {known.folder(cache)}")
        return
    print(f"downloading {known.name} to {known.folder(cache)}", flush=True)
    try:
        download(known, cache, on_progress=line.show, say=line.say)
    except FigmentError as error:
        raise FigmentError(
            f"{error}; the same command tries again, or bring the files here in another way and name their place:"
            f" python -m jobs.ingest PATH --dataset-name {known.name}"
        ) from error
    finally:
        line.end()


def _layout(source: Source, options: IngestOptions) -> Layout:
    layout, images = plan_layout(source, options)
    images.close()
    return layout


def _source(job: IngestJob, limits: Limits, called: str | None) -> Source:
    fs, path = open_source(job.source)
    name = called or (redact(job.source) if "://" in job.source else path)
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


def _print_plan(source: Source, layout: Layout, options: IngestOptions, dest: str, download: str) -> None:
    channels, height, width = layout.image_shape
    print(f"source          {source.name}")
    if download:
        print(f"download        {download}")
    print(f"format          {layout.format}")
    print(f"data set        {options.dataset_name} in {redact(dest)}")
    print(f"images          {channels} x {height} x {width}, stored as {layout.encoding}")
    if layout.crop is not None:
        print(f"crop            the middle {layout.crop} x {layout.crop} pixels of each image, then resized")
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


class _Line:
    """A line that is overwritten, or, without a terminal, lines of their own."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self._open = False

    def write(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n", flush=True)
        self._open = self.live

    def end(self) -> None:
        if self._open:
            print(flush=True)
        self._open = False


class _DownloadLine(_Line):
    """How far a download is, and what went wrong on the way."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = self._began = time.monotonic()
        self._file: PublishedFile | None = None
        self._first = 0  # bytes of the file that lay here before

    def show(self, file: PublishedFile, got: int) -> None:
        now = time.monotonic()
        if file is not self._file:
            self._file, self._first, self._began = file, got, now
        if now - self._shown < (0.2 if self.live else LOG_EVERY_S) and got < file.bytes:
            return
        self._shown = now
        speed = max(got - self._first, 0) / max(now - self._began, 1e-9)
        text = f"  {file.name}  {got:,} of {file.bytes:,} bytes  {got / file.bytes:.0%}"
        if speed > 0 and got < file.bytes:
            seconds = round((file.bytes - got) / speed)
            text += f"  {speed / 1e6:,.2f} MB/s  ETA {seconds // 60}:{seconds % 60:02d}"
        self.write(text)
        if got == file.bytes:
            self.end()

    def say(self, text: str) -> None:
        self.end()
        print(f"  {text}", flush=True)


class _LiveLine(_Line):
    """How far an ingest is."""

    def __init__(self) -> None:
        super().__init__()
        self._before: Progress | None = None

    def show(self, progress: Progress) -> None:
        before = self._before or Progress(0, 0, 0, 0, None, 0.0)
        if not self.live and self._before and progress.seconds - before.seconds < LOG_EVERY_S:
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
        self.write(text)


if __name__ == "__main__":
    main()
