"""One window of shards out of the storage: what a task of the stream does.

Fetch each shard whole, check size and sha256 against the manifest, put its rows at their places in the order, hand out
contiguous Arrow blocks. Raw images and columns are moved as bytes and never become Python objects. Encoded images are
decoded block by block in the same task: tasks of their own for that were given one window at a time by Ray Data, and
half of the cores had nothing to do (docs/results.md).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipelines.data.columns import Column, ColumnError
from pipelines.data.images import DAMAGE, open_image
from pipelines.data.manifest import Manifest, Shard
from pipelines.data.plan import Window, window_order
from pipelines.errors import FigmentError

BLOCK_BYTES = 32 * 2**20  # decoded images of one Arrow block
REPAIR = "delete it and run the ingest of the data set again, which writes what is missing"


@dataclass(frozen=True)
class Layout:
    """What a task has to know of the data set."""

    name: str
    root: str
    image_shape: tuple[int, int, int]
    encoding: str
    columns: tuple[Column, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> Layout:
        return cls(manifest.name, manifest.root, manifest.image_shape, manifest.encoding, manifest.columns)

    @property
    def raw(self) -> bool:
        return self.encoding == "raw"

    @property
    def width(self) -> int:
        """Bytes of one decoded image."""
        return math.prod(self.image_shape)


@dataclass(frozen=True)
class Read:
    """Rows lo … hi-1 of shards read together; in stored order where `order` is None, else (seed, epoch, window)."""

    shards: tuple[Shard, ...]
    lo: int
    hi: int
    order: tuple[int, int, Window] | None = None

    @property
    def rows(self) -> int:
        return self.hi - self.lo


def read_window(fs: pafs.FileSystem, layout: Layout, read: Read) -> Iterator[pa.Table]:
    """Blocks of the rows asked for, in order: `image` as fixed-size binary of C*H*W bytes, `label` int32, and
    each of the data set's columns as fixed-size lists.

    Raises `FigmentError` naming the shard that is missing, cut off, damaged or not what the manifest says.
    """
    step = max(1, BLOCK_BYTES // layout.width)
    if not layout.raw:
        files = _encoded(fs, layout, read)
        for i in range(0, read.rows, step):
            yield decode(layout, files.slice(i, step))
        return
    images = np.empty((read.rows, layout.width), np.uint8)
    labels = np.empty(read.rows, np.int32)
    numbers = {column: np.empty((read.rows, column.width), column.dtype) for column in layout.columns}
    for shard, rows, places in _asked(read):
        table = _load(fs, layout, shard)
        pixels, ids = pixels_of(table["image"], layout.width), table["label"].to_numpy()
        images[places], labels[places] = pixels[rows], ids[rows]
        for column, values in numbers.items():
            values[places] = column.numbers(table[column.name])[rows]
    for i in range(0, read.rows, step):
        part = slice(i, i + step)
        yield _table(images[part], labels[part], {c.name: c.as_block(v[part]) for c, v in numbers.items()})


def read_rows(fs: pafs.FileSystem, layout: Layout, shard: Shard, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (n, C*H*W), labels (n,)) of these rows of one shard; `FigmentError` as of `read_window`."""
    table = _load(fs, layout, shard)
    if layout.raw:
        return pixels_of(table["image"], layout.width)[rows], table["label"].to_numpy()[rows]
    block = decode(layout, _named(layout, shard, table, rows))
    return pixels_of(block["image"], layout.width), block["label"].to_numpy()


def decode(layout: Layout, block: pa.Table) -> pa.Table:
    """Pixels of encoded images, of which each comes with `where` it is from: `FigmentError` names a bad one so."""
    pixels = np.empty((block.num_rows, *layout.image_shape), np.uint8)
    for i, (image, where) in enumerate(zip(block["image"], block["where"], strict=True)):
        pixels[i] = _decode(layout, image.as_buffer(), where)
    columns = {column.name: block[column.name] for column in layout.columns}
    return _table(pixels.reshape(-1, layout.width), block["label"], columns)


def _encoded(fs: pafs.FileSystem, layout: Layout, read: Read) -> pa.Table:
    tables, order = [], []
    for shard, rows, places in _asked(read):
        tables.append(_named(layout, shard, _load(fs, layout, shard), np.arange(shard.rows)[rows]))
        order.append(places)
    return pa.concat_tables(tables).take(np.argsort(np.concatenate(order)))


def _named(layout: Layout, shard: Shard, table: pa.Table, ids: np.ndarray) -> pa.Table:
    """These rows of a shard's table, each with `where` it is from."""
    where = pa.array([f"row {i} of shard {layout.root}/{shard.path}" for i in ids.tolist()], pa.string())
    return table.take(ids).append_column("where", where)


def _asked(read: Read) -> Iterator[tuple[Shard, np.ndarray | slice, np.ndarray]]:
    """(shard, its rows that are asked for, their places in the output); shards of which none is are left out."""
    total = sum(shard.rows for shard in read.shards)
    places = np.empty(total, np.int64)
    places[slice(None) if read.order is None else window_order(*read.order)] = np.arange(total) - read.lo
    for shard, to in zip(read.shards, np.split(places, np.cumsum([s.rows for s in read.shards])[:-1]), strict=True):
        rows = (to >= 0) & (to < read.rows)
        if rows.all():
            yield shard, slice(None), to  # a whole shard needs no second copy
        elif rows.any():
            yield shard, rows, to[rows]


def pixels_of(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """uint8 (N, width) of a fixed-size binary column, without a copy where it is one chunk."""
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width).reshape(-1, width)
        for chunk in column.chunks
        if len(chunk)
    ]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, width), np.uint8)


def _table(
    pixels: np.ndarray, labels: np.ndarray | pa.ChunkedArray, columns: Mapping[str, pa.Array | pa.ChunkedArray]
) -> pa.Table:
    width = pixels.shape[1]
    images = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(pixels), [None, pa.py_buffer(pixels)])
    return pa.table({"image": images, "label": labels, **columns})


def _load(fs: pafs.FileSystem, layout: Layout, shard: Shard) -> pa.Table:
    """The table of a shard, its columns as fixed-size lists, when size and sha256 are what the manifest says."""
    path = f"{layout.root}/{shard.path}"
    where = f"shard {path} of data set {layout.name!r}"
    try:
        # One request for the whole object: a stream of a pyarrow S3 filesystem reads it in many, ten times slower.
        with fs.open_input_file(path) as file:
            data = file.read_buffer()  # no copy of what a patient filesystem has in memory already
    except FileNotFoundError as error:
        raise FigmentError(f"{where} is missing in the storage; {REPAIR}") from error
    except OSError as error:
        reason = " ".join(str(error).split())  # one sentence, however many lines the storage has to say
        raise FigmentError(f"{where} cannot be read: {reason}; check the storage and run it again") from error
    if data.size != shard.bytes:
        raise FigmentError(f"{where} has {data.size} bytes, its manifest says {shard.bytes}; {REPAIR}")
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise FigmentError(f"{where} is damaged: its sha256 is not the one of the manifest; {REPAIR}")
    try:
        names = ["image", "label", *(column.name for column in layout.columns)]
        table = pq.ParquetFile(pa.BufferReader(data)).read(columns=names, use_threads=False)
    except pa.ArrowException as error:
        raise FigmentError(f"{where} is not readable Parquet ({error}); {REPAIR}") from error
    image = pa.binary(layout.width) if layout.raw else pa.binary()
    types = [image, pa.int32(), *(column.stored for column in layout.columns)]
    if table.num_rows != shard.rows or table.schema.types != types:
        raise FigmentError(
            f"{where} has {table.num_rows} rows of {table.schema.types}, its manifest says {shard.rows} of"
            f" {types}; {REPAIR}"
        )
    return table if not layout.columns else _with_blocks(layout, table, where)


def _with_blocks(layout: Layout, table: pa.Table, where: str) -> pa.Table:
    try:
        columns = {column.name: column.as_block(column.numbers(table[column.name])) for column in layout.columns}
    except (ColumnError, pa.ArrowException) as error:
        raise FigmentError(f"{where} is not what its manifest says: {error}; {REPAIR}") from error
    return pa.table({"image": table["image"], "label": table["label"], **columns})


def _decode(layout: Layout, file: pa.Buffer, where: pa.StringScalar) -> np.ndarray:
    """uint8 (C, H, W) of one encoded image."""
    gray = layout.image_shape[0] == 1
    try:
        image = open_image(memoryview(file), (layout.encoding.upper(),))
        shape = (layout.image_shape[0], image.height, image.width)
        # Asked before it is decoded: what the header claims may be more than the memory holds.
        pixels = np.asarray(image.convert("L" if gray else "RGB")) if shape == layout.image_shape else None
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FigmentError(f"{where} cannot be decoded ({reason}); {REPAIR}") from error
    if pixels is None:
        raise FigmentError(f"{where} has shape {shape}, the manifest says {layout.image_shape}; {REPAIR}")
    return pixels[None] if gray else pixels.transpose(2, 0, 1)
