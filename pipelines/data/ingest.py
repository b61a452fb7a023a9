"""A source into a data set version: read once, decode on Ray workers, scatter, pack, and the manifest last.

What is held is bounded, however long the source and however large the images are: open shards and those on their way to
storage hold `HELD_BYTES` at most (for each split, where splits come mixed: in CIFAR-10); beside them there are a few
batches of BATCH_BYTES in and RESULT_BYTES out. A run that was killed is repeated: it reads the source again, but
decodes neither what finished shards hold nor writes them again (`packing.Journal`).
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain

import numpy as np
import ray
from pyarrow import fs as pafs

from pipelines.data.images import Bad, Row, prepare, stored_shape
from pipelines.data.ingest_options import WRITERS, IngestOptions, Layout, ingest_key, plan_layout
from pipelines.data.manifest import DATASETS, Manifest, Skipped, load_manifest, save_manifest, versions
from pipelines.data.packing import SKIPPED_SHOWN, Journal, Packed, Scatter, even_parts, pack
from pipelines.data.sources import CITATIONS, SPLITS_IN_TURN
from pipelines.data.sources_io import EncodedImage, ImageFile, Images, Source, SourceImage
from pipelines.errors import FigmentError

BATCH_IMAGES, BATCH_BYTES = 128, 8 * 2**20  # what one decode task gets: whichever is reached first
RESULT_BYTES = 32 * 2**20  # what it gives back at most
TICK_S = 2.0


@dataclass(frozen=True)
class Progress:
    images: int  # of the source, so far
    skipped: int
    shards: int
    bytes_read: int
    bytes_total: int | None  # None: unknown
    seconds: float


@dataclass(frozen=True)
class IngestResult:
    manifest: Manifest
    path: str  # of the manifest
    already_there: bool  # nothing was written: this version was complete
    images: int  # read from the source in this run
    prepared: int  # of them, decoded or copied: not in a shard that an earlier run had finished
    most_held: int  # bytes of images in open shards and in those being written, at the worst moment
    seconds: float


def ingest(
    source: Source,
    fs: pafs.FileSystem,
    options: IngestOptions,
    *,
    connect: Callable[[], object] = lambda: None,
    on_progress: Callable[[Progress], object] = lambda progress: None,
) -> IngestResult:
    """Writes `source` as a version of data set `options.dataset_name` under `fs`; the manifest appears last.

    `connect` is called before the first image goes to a Ray worker; images stored as they are need none.
    Repeating a finished ingest writes nothing, repeating a killed one goes on. Raises `FigmentError` for input that is
    wrong, damaged or cut off, `OSError` when the storage cannot be written.
    """
    began = time.perf_counter()
    layout, images = plan_layout(source, options)
    key = ingest_key(source, options, layout)
    done = ingested(fs, options.dataset_name, key)
    if done:
        images.close()
        return done
    journal = Journal(fs, options.dataset_name, key)
    run = _Run(source, fs, options, layout, journal, connect, on_progress)
    run.run(images)
    manifest = run.manifest(key)
    path = f"{manifest.folder}/manifest.json"
    there = _complete(fs, options.dataset_name, manifest.version)
    if there is None:
        save_manifest(fs, manifest)
    journal.delete()
    already_there = there is not None and not run.wrote
    seconds = time.perf_counter() - began
    return IngestResult(there or manifest, path, already_there, run.images, run.prepared, run.held.most, seconds)


def ingested(fs: pafs.FileSystem, name: str, key: str) -> IngestResult | None:
    """The version that an earlier ingest with this key made, if it is whole."""
    began = time.perf_counter()
    done = _finished(fs, name, key)
    if done is None:
        return None
    Journal(fs, name, key).delete()  # of a run that was killed after its manifest, or of one that lost a race
    return IngestResult(done, f"{done.folder}/manifest.json", True, 0, 0, 0, time.perf_counter() - began)


@dataclass(frozen=True)
class _Place:
    """Where an image is to go."""

    split: str
    number: int  # of the shard
    key: int  # order within the shard


_Filling = defaultdict[tuple[str, int], list[tuple[int, Row | Bad]]]
"""(split, number of the shard) -> its rows so far, each with the key that it is sorted by."""


class _Run:
    """One pass over the source."""

    def __init__(
        self,
        source: Source,
        fs: pafs.FileSystem,
        options: IngestOptions,
        layout: Layout,
        journal: Journal,
        connect: Callable[[], object],
        on_progress: Callable[[Progress], object],
    ) -> None:
        self._source, self._fs, self._options, self._layout = source, fs, options, layout
        self._journal, self._connect, self._on_progress = journal, connect, on_progress
        self._root = f"{DATASETS}/{options.dataset_name}"
        self._done = journal.load()  # (split, number) -> full shards
        self._rest: dict[str, list[Packed]] = {}  # split -> shards made of what is left when the source ends
        self._scatter: dict[str, Scatter] = {}
        self._skipped = 0
        self._began = self._ticked = time.monotonic()
        self._bytes_total = source.size()
        self.label_names: tuple[str, ...] = ()
        self.images = self.prepared = 0
        self.wrote = False
        self.held = _Held()

    def run(self, images: Images) -> None:
        """Takes every image and writes every shard."""
        filling: _Filling = defaultdict(list)
        with ThreadPoolExecutor(WRITERS, "figment-pack") as writers:
            writing: deque[Future[None]] = deque()
            split = ""
            for place, item in self._prepare(self._place(images)):
                if split not in ("", place.split) and self._layout.format in SPLITS_IN_TURN:
                    self._pack_rest(split, filling, writers)  # now, so that two splits are never held at once
                split, target = place.split, (place.split, place.number)
                filling[target].append((place.key, item))
                self.held.add(_bytes(item))
                if len(filling[target]) == self._layout.rows_per_shard:
                    writing.append(writers.submit(self._write_full, *target, _in_order(filling.pop(target))))
                while len(writing) > WRITERS or (writing and writing[0].done()):
                    writing.popleft().result()
            for each in self._scatter:
                self._pack_rest(each, filling, writers)
            for future in writing:
                future.result()
        self._tick(force=True)

    def _pack_rest(self, split: str, filling: _Filling, writers: ThreadPoolExecutor) -> None:
        """The shards of a split that are not full, when no more of its images come."""
        numbers = [number for s, number in filling if s == split]
        left = _in_order([entry for number in numbers for entry in filling.pop((split, number))])
        parts = even_parts(left, self._layout.rows_per_shard)
        self._rest.setdefault(split, []).extend(writers.map(self._pack, parts))
        self.held.add(-sum(map(_bytes, left)))

    def _place(self, images: Images) -> Iterator[tuple[_Place, SourceImage]]:
        """Finds every image its place, and lets go of those whose shard an earlier run has written."""
        while True:
            try:
                image = next(images)
            except StopIteration as end:
                self.label_names = end.value
                return
            shape = stored_shape(image, self._layout.size)
            if shape != self._layout.image_shape:
                raise FigmentError(
                    f"{self._source.name}, {image.member}: its shape is {shape}, that of the images before it"
                    f" {self._layout.image_shape} (channels, height, width); --size makes them all one"
                )
            scatter = self._scatter.get(image.split)
            if scatter is None:
                rows, at_once = self._layout.rows_per_shard, self._layout.open_shards
                scatter = self._scatter[image.split] = Scatter(image.split, rows, at_once)
            number, key = scatter.place()
            self.images += 1
            self._tick()
            if (image.split, number) not in self._done:
                yield _Place(image.split, number, key), image

    def _prepare(self, placed: Iterator[tuple[_Place, SourceImage]]) -> Iterator[tuple[_Place, Row | Bad]]:
        """Decodes on Ray workers, in order, with a bounded number of batches on their way."""
        size, encoding, crop = self._layout.size, self._layout.encoding, self._layout.crop
        batch = max(1, min(BATCH_IMAGES, RESULT_BYTES // self._layout.image_bytes))
        if size is None and encoding == "raw":  # nothing to compute: a worker would cost more than it gains
            for places, images in _batches(placed, batch):
                yield from self._checked(places, prepare(images, size, encoding))
            return
        self._connect()
        task = ray.remote(prepare)
        most_in_flight = max(4, 2 * int(ray.cluster_resources().get("CPU", 1)))
        in_flight: deque[tuple[list[_Place], ray.ObjectRef]] = deque()
        try:
            for places, images in _batches(placed, batch):
                fs = self._source.fs if any(isinstance(image, ImageFile) for image in images) else None
                in_flight.append((places, task.remote(images, size, encoding, fs, self._source.limits, crop)))
                while len(in_flight) >= most_in_flight:
                    yield from self._checked(*self._await(*in_flight.popleft()))
            while in_flight:
                yield from self._checked(*self._await(*in_flight.popleft()))
        finally:
            for _, reference in in_flight:
                ray.cancel(reference)

    def _await(self, places: list[_Place], reference: ray.ObjectRef) -> tuple[list[_Place], list[Row | Bad]]:
        while not ray.wait([reference], timeout=TICK_S)[0]:
            self._tick()
        return places, ray.get(reference)

    def _checked(self, places: list[_Place], items: list[Row | Bad]) -> Iterator[tuple[_Place, Row | Bad]]:
        self.prepared += len(items)
        for place, item in zip(places, items, strict=True):
            if isinstance(item, Bad):
                if self._options.on_bad_image == "fail":
                    raise FigmentError(
                        f"{self._source.name}, {item.member}: not a readable image ({item.reason});"
                        " --on-bad-image skip leaves such images out and counts them"
                    )
                self._skipped += 1
            yield place, item

    def _pack(self, items: Sequence[Row | Bad]) -> Packed:
        packed, written = pack(self._fs, self._root, items, self._layout.encoding, self._source.columns)
        self.wrote = self.wrote or written
        return packed

    def _write_full(self, split: str, number: int, items: Sequence[Row | Bad]) -> None:
        packed = self._pack(items)
        self._journal.add(split, number, packed)
        self._done[split, number] = packed
        self.held.add(-sum(map(_bytes, items)))

    def _tick(self, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._ticked >= TICK_S or force:
            self._ticked = now
            shards = len(self._done) + sum(map(len, self._rest.values()))
            read, seconds = self._source.bytes_read, now - self._began
            self._on_progress(Progress(self.images, self._skipped, shards, read, self._bytes_total, seconds))

    def manifest(self, key: str) -> Manifest:
        packed = {
            split: [self._done[k] for k in sorted(self._done) if k[0] == split] + self._rest[split]
            for split in self._scatter
        }
        splits = {split: tuple(p.shard for p in found if p.shard) for split, found in packed.items()}
        splits = {split: shards for split, shards in splits.items() if shards}
        if not splits:
            raise FigmentError(f"{self._source.name}: not one of its {self.images:,} images could be decoded")
        measured = "train" if "train" in splits else next(iter(splits))
        pixels = sum(shard.rows for shard in splits[measured]) * math.prod(self._layout.image_shape[1:])
        sums = np.sum([p.sums for p in packed[measured] if p.shard], axis=0)
        everything = [p for found in packed.values() for p in found]
        members = tuple(chain.from_iterable(p.skipped_members for p in everything))[:SKIPPED_SHOWN]
        source: dict[str, object] = {"url": self._source.name, "format": self._layout.format, "key": key}
        if self._layout.crop is not None:
            source["crop"] = self._layout.crop
        if self._layout.format in CITATIONS:
            source["citation"] = CITATIONS[self._layout.format]
        source |= {**self._source.about, **self._source.found}
        return Manifest(
            name=self._options.dataset_name,
            splits=splits,
            image_shape=self._layout.image_shape,
            encoding=self._layout.encoding,
            label_names=self.label_names,
            channel_mean=tuple(round(float(s) / pixels, 6) for s in sums),
            source=source,
            created_at=datetime.now(UTC).isoformat(),
            skipped=Skipped(sum(p.skipped for p in everything), members),
            columns=self._source.columns,
        )


class _Held:
    """Bytes that are held, and the most that ever were. Writers count down while the pass counts up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = self.most = 0

    def add(self, size: int) -> None:
        with self._lock:
            self._now += size
            self.most = max(self.most, self._now)


def _bytes(item: Row | Bad) -> int:
    return len(item.image) if isinstance(item, Row) else 0


def _in_order(entries: list[tuple[int, Row | Bad]]) -> list[Row | Bad]:
    return [item for _, item in sorted(entries, key=lambda entry: entry[0])]


def _batches(
    placed: Iterable[tuple[_Place, SourceImage]], largest: int
) -> Iterator[tuple[list[_Place], list[SourceImage]]]:
    places: list[_Place] = []
    images: list[SourceImage] = []
    size = 0
    for place, image in placed:
        places.append(place)
        images.append(image)
        size += len(image.data) if isinstance(image, EncodedImage) else 0
        if len(images) == largest or size >= BATCH_BYTES:
            yield places, images
            places, images, size = [], [], 0
    if images:
        yield places, images


def _finished(fs: pafs.FileSystem, name: str, key: str) -> Manifest | None:
    """The version that an earlier ingest with this key made."""
    found = (manifest for manifest in versions(fs, name) if manifest.source.get("key") == key)
    return next((manifest for manifest in found if _whole(fs, manifest)), None)


def _complete(fs: pafs.FileSystem, name: str, version: str) -> Manifest | None:
    """This version, if its manifest can be read and all its shards are there; else it is written anew."""
    try:
        manifest = load_manifest(fs, f"{name}@{version}")
    except FigmentError:  # none, edited, or of another format
        return None
    return manifest if _whole(fs, manifest) else None


def _whole(fs: pafs.FileSystem, manifest: Manifest) -> bool:
    shards = [shard for found in manifest.splits.values() for shard in found]
    return all(fs.get_file_info(f"{manifest.root}/{shard.path}").size == shard.bytes for shard in shards)
