"""Rows into shards: which shard a row goes to, the Parquet file, and the journal of the shards that are done.

Archives are often sorted by class, so rows are scattered over `mix_shards` open shards by a hash of their index. Where
a row goes depends on nothing but its index: a second pass over the same source knows, before it decodes an image,
whether the shard of that image is already written.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipelines.data.columns import Column, ColumnError
from pipelines.data.images import Bad, Row
from pipelines.data.manifest import DATASETS, Shard
from pipelines.errors import FigmentError
from pipelines.objects import children, exists, read_json, read_object, write_json, write_object

SKIPPED_SHOWN = 100
TRIES = 100  # of what another ingest at the same time can undo; each takes less than a millisecond on a disk
_ENTRY = re.compile(r"(.+)-(\d{7,})\.json")

T = TypeVar("T")


class Scatter:
    """Gives each row of one split, in the order of the source, a shard number and a key to sort that shard by."""

    def __init__(self, split: str, rows_per_shard: int, mix_shards: int) -> None:
        self._split = split
        self._rows_per_shard = rows_per_shard
        self._numbers = list(range(mix_shards))  # of the shard that is being filled in each slot
        self._fill = [0] * mix_shards
        self._next = mix_shards
        self.index = 0

    def place(self) -> tuple[int, int]:
        """(shard number, key) of the next row. A shard is full when it was given `rows_per_shard` times."""
        digest = hashlib.blake2b(f"{self._split}/{self.index}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "big")
        slot = key % len(self._numbers)
        number = self._numbers[slot]
        self._fill[slot] += 1
        if self._fill[slot] == self._rows_per_shard:
            self._numbers[slot], self._fill[slot] = self._next, 0
            self._next += 1
        self.index += 1
        return number, key


def even_parts(items: Sequence[T], largest: int) -> list[Sequence[T]]:
    """As few parts of at most `largest` items as can be, of sizes that differ by one at most."""
    parts = -(-len(items) // largest)
    return [items[len(items) * k // parts : len(items) * (k + 1) // parts] for k in range(parts)]


@dataclass(frozen=True)
class Packed:
    """One written shard and what the manifest has to know of the images that were meant for it."""

    shard: Shard | None  # None: not one of its images could be decoded
    sums: tuple[int, ...] = ()  # of the pixel values of each channel
    skipped: int = 0
    skipped_members: tuple[str, ...] = ()  # the first SKIPPED_SHOWN, with the reason


def pack(
    fs: pafs.FileSystem, root: str, prepared: Sequence[Row | Bad], encoding: str, columns: Sequence[Column] = ()
) -> tuple[Packed, bool]:
    """The rows among `prepared`, in their order, as one shard under `root`; also whether it had to be written.

    One row group, plain encoding, no compression: the reader gets each column as one contiguous block. Pixels do not
    compress (2 % on CIFAR-10 for zstd, which halves the speed of reading), encoded images are compressed.
    """
    rows = [item for item in prepared if isinstance(item, Row)]
    skipped = [f"{item.member}: {item.reason}" for item in prepared if isinstance(item, Bad)]
    left_out: dict[str, Any] = {"skipped": len(skipped), "skipped_members": tuple(skipped[:SKIPPED_SHOWN])}
    if not rows:
        return Packed(None, **left_out), False
    images = b"".join(row.image for row in rows)
    labels = np.array([row.label for row in rows], "<i4")
    numbers = [column.stack([row.columns[column.name] for row in rows]) for column in columns]
    content = _content(images, labels, columns, numbers)
    if encoding == "raw":
        width = len(rows[0].image)
        stored = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(images)])
    else:
        ends = np.cumsum([0, *(len(row.image) for row in rows)]).astype("<i4")
        stored = pa.BinaryArray.from_buffers(pa.binary(), len(rows), [None, pa.py_buffer(ends), pa.py_buffer(images)])
    table = pa.table({"image": stored, "label": pa.array(labels, pa.int32())})
    for column, values in zip(columns, numbers, strict=True):
        table = table.append_column(pa.field(column.name, column.stored, nullable=False), column.as_list(values))
    data = _parquet(table)
    path = f"shards/{content[:16]}.parquet"
    there = _already_there(fs, f"{root}/{path}", content, columns)
    if there is None:
        write_object(fs, f"{root}/{path}", data)
    kept = there if there is not None else data
    shard = Shard(path, len(rows), len(kept), hashlib.sha256(kept).hexdigest(), content)
    sums = tuple(np.array([row.sums for row in rows]).sum(axis=0).tolist())
    return Packed(shard, sums, **left_out), there is None


def _content(images: bytes, labels: np.ndarray, columns: Sequence[Column], numbers: Sequence[np.ndarray]) -> str:
    """sha256 of what a reader sees of the rows; two columns of the same numbers and other names are not the same."""
    content = hashlib.sha256(images)
    content.update(labels.tobytes())
    for column, values in zip(columns, numbers, strict=True):
        content.update(f"{column.name} {column.dtype} {column.width}\n".encode())
        content.update(values.tobytes())
    return content.hexdigest()


def _parquet(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=len(table),
        compression="NONE",
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
    )
    return memoryview(sink.getvalue())


def _already_there(fs: pafs.FileSystem, path: str, content_sha256: str, columns: Sequence[Column]) -> bytes | None:
    """The file at `path` if it holds these rows, whichever version of the writer made it."""
    if not exists(fs, path):
        return None
    data = read_object(fs, path)
    try:
        table = pq.read_table(pa.BufferReader(data))
        numbers = [column.numbers(table[column.name]) for column in columns]
        images, labels = b"".join(table["image"].to_pylist()), table["label"].to_numpy().astype("<i4")
    except (pa.ArrowException, KeyError, OSError, ColumnError):
        return None  # damaged: it is written anew
    return data if _content(images, labels, columns, numbers) == content_sha256 else None


class Journal:
    """The shards that an ingest has finished, in storage beside them: `datasets/NAME/.ingest-KEY/SPLIT-NUMBER.json`.

    Two ingests of one source share it, and the one that ends first deletes it under the other: an entry that went, or
    cannot be read, only means that a shard is made again.
    """

    def __init__(self, fs: pafs.FileSystem, dataset: str, key: str) -> None:
        self._fs = fs
        self._root = f"{DATASETS}/{dataset}"
        self._folder = f"{self._root}/.ingest-{key[:16]}"

    def load(self) -> dict[tuple[str, int], Packed]:
        """What an earlier run of the same ingest has finished and is still there."""
        found: dict[tuple[str, int], Packed] = {}
        try:
            names = children(self._fs, self._folder)
        except FileNotFoundError:  # a folder on a disk went between the look at it and the listing
            return found
        for name in names:
            entry = _ENTRY.fullmatch(name)
            packed = self._read(name) if entry else None
            if entry and packed:
                found[entry[1], int(entry[2])] = packed
        return found

    def _read(self, name: str) -> Packed | None:
        try:
            body = read_json(self._fs, f"{self._folder}/{name}")
            shard = Shard(**body["shard"]) if body["shard"] else None
            packed = Packed(shard, tuple(body["sums"]), body["skipped"], tuple(body["skipped_members"]))
        except (OSError, ValueError, KeyError, TypeError):  # a storage cuts off what is deleted while it is read
            return None
        there = shard is None or self._fs.get_file_info(f"{self._root}/{shard.path}").size == shard.bytes
        return packed if there else None

    def add(self, split: str, number: int, packed: Packed) -> None:
        path = f"{self._folder}/{split}-{number:07d}.json"
        for _ in range(TRIES):
            try:
                return write_json(self._fs, path, asdict(packed))
            except (FileNotFoundError, FileExistsError):
                continue  # a folder on a disk was deleted while it was made, or between that and its use
        return write_json(self._fs, path, asdict(packed))

    def delete(self) -> None:
        for _ in range(TRIES):
            try:
                if exists(self._fs, self._folder):
                    self._fs.delete_dir(self._folder)
                return
            except FileNotFoundError:
                continue  # another deletes it too
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
        # Another ingest of the same source keeps writing there; it deletes the folder at its own end.


def check_name(name: str) -> None:
    """Data set names are one path segment, so that nothing is written beside the place for data sets."""
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isalnum() and plain.isascii() and name[0].isalnum()):
        raise FigmentError(
            f"data set name {name!r}: use letters, digits, '-', '_' and '.', and begin with a letter or digit"
        )
