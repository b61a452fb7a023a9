"""Sources that hold bare pixels: CIFAR-10 in both layouts, and IDX files."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from pyarrow import fs as pafs

from pipelines.data.pickles import OPCODES, PickleError, unpickle
from pipelines.data.sources_io import Images, RawImage, Source, read_exactly
from pipelines.data.sources_tar import Member, read_whole, tar_members

CIFAR_SHAPE = (3, 32, 32)
CIFAR_PIXELS = 3 * 32 * 32
CIFAR_RECORD = 1 + CIFAR_PIXELS  # bytes: one label, then the red, green and blue planes
RECORDS_AT_ONCE = 512
META_BYTES = 1 << 16
PIECE_BYTES = 8 << 20  # of IDX images, whose size a header says


# --- CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html) ----------------------------------------


def cifar10_binary(source: Source) -> Images:
    """`cifar-10-binary.tar.gz`: `data_batch_N.bin` and `test_batch.bin` of records of 1 label and 3,072 pixel bytes."""
    names: tuple[str, ...] = ()
    for member in tar_members(source, source.open()):
        if member.base_name == "batches.meta.txt":
            if member.size > META_BYTES:
                source.refuse(f"has {member.size:,} bytes, ten label names are expected")
            names = tuple(read_whole(source, member).decode("utf-8", "replace").split())
        elif split := _cifar_split(member, ".bin"):
            for first, records in cifar_records(source, member, CIFAR_RECORD):
                check_labels(source, records[:, 0], 10, first, CIFAR_RECORD)
                for i, record in enumerate(records, first):
                    yield RawImage(split, record[1:].reshape(CIFAR_SHAPE), int(record[0]), f"{member.name}[{i}]")
    return _ten_names(source, names, "batches.meta.txt")


def cifar10_python(source: Source) -> Images:
    """`cifar-10-python.tar.gz`: pickled dicts of `data` uint8 (N, 3072) and `labels`; nothing in them can run."""
    names: tuple[str, ...] = ()
    for member in tar_members(source, source.open()):
        if member.base_name == "batches.meta":
            names = pickled_names(unpickled(source, read_whole(source, member)).get(b"label_names"), 10)
        elif split := _cifar_split(member, ""):
            batch = unpickled(source, read_whole(source, member))
            pixels = batch_pixels(source, batch)
            labels = batch_labels(source, batch, b"labels", len(pixels), 10)
            for i, (row, label) in enumerate(zip(pixels, labels, strict=True)):
                yield RawImage(split, row.reshape(CIFAR_SHAPE), int(label), f"{member.name}[{i}]")
    return _ten_names(source, names, "batches.meta")


def _cifar_split(member: Member, suffix: str) -> str | None:
    if re.fullmatch(rf"data_batch_\d+{re.escape(suffix)}", member.base_name):
        return "train"
    return "test" if member.base_name == f"test_batch{suffix}" else None


def _ten_names(source: Source, names: tuple[str, ...], where: str) -> tuple[str, ...]:
    if len(names) != 10:
        source.refuse(
            f"has no {where} with ten label names (it has {len(names)}): this is not the whole official archive"
        )
    return names


def cifar_records(source: Source, member: Member, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first, uint8 (n, size)) of the records of a member, some hundreds at a time."""
    count = member.size // size
    if member.size == 0 or member.size % size:
        source.refuse(f"has {member.size:,} bytes, which is no multiple of the {size:,} of a record")
    for first in range(0, count, RECORDS_AT_ONCE):
        n = min(RECORDS_AT_ONCE, count - first)
        data = read_exactly(source, member.stream, n * size, f"its {count:,} records")
        yield first, np.frombuffer(data, np.uint8).reshape(n, size)


def batch_pixels(source: Source, batch: dict[bytes, Any]) -> np.ndarray:
    """uint8 (N, 3072) of a pickled batch."""
    pixels = batch.get(b"data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (CIFAR_PIXELS,):
        source.refuse(f"its b'data' is no uint8 array of shape (N, {CIFAR_PIXELS:,})")
    return pixels


def batch_labels(source: Source, batch: dict[bytes, Any], key: bytes, rows: int, classes: int) -> np.ndarray:
    """int (rows,): the labels that stand under `key` in a pickled batch, each in 0 … classes - 1."""
    labels = batch.get(key)
    # The types come first: NumPy would try to unfold whatever lies in a list.
    if not isinstance(labels, list) or not all(type(n) is int and abs(n) < 2**31 for n in labels):
        source.refuse(f"its {key!r} is no list of numbers")
    if len(labels) != rows:
        source.refuse(f"has {rows:,} images and {len(labels):,} {key!r}")
    found = np.asarray(labels)
    check_labels(source, found, classes)
    return found


def pickled_names(found: object, classes: int) -> tuple[str, ...]:
    """The names of a list as long as it must be: a short pickle can name one long text many times."""
    if not isinstance(found, list) or len(found) != classes:
        return ()
    return tuple(name.decode("utf-8", "replace") for name in found if isinstance(name, bytes))


def check_labels(source: Source, labels: np.ndarray, classes: int, first: int = 0, stride: int = 0) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        record = first + int(wrong[0])
        where = f"record {record:,}" + (f" (byte {record * stride:,} of the member)" if stride else "")
        source.refuse(f"{where} has label {labels[wrong[0]]}, labels are 0 … {classes - 1}")


def unpickled(source: Source, data: bytes, opcodes: int = OPCODES) -> dict[bytes, Any]:
    """The dict that a member is a pickle of."""
    try:
        return unpickle(data, opcodes)
    except PickleError as error:
        source.refuse(f"is not a pickle of arrays: {error}")


# --- IDX: MNIST (LeCun et al. 1998), Fashion-MNIST (Xiao et al. 2017) -------------------------------------------------


def idx(source: Source) -> Images:
    """Pairs of `{train,t10k}-images-idx3-ubyte` and `…-labels-idx1-ubyte`, gzipped or not, in one folder.

    `source` is the folder, or one of its images files (on the web folders cannot be listed). The files hold numbers, so
    label names are the digits of the labels.
    """
    pairs = idx_pairs(source)
    if not pairs:
        source.refuse("has no file {train,t10k}-images-idx3-ubyte[.gz]")
    classes = 0
    for split, (images_path, labels_path) in pairs.items():
        if labels_path is None:
            source.refuse(f"{images_path} stands there without its labels-idx1-ubyte[.gz]")
        with source.open(images_path) as images, source.open(labels_path) as labels:
            n, height, width = _idx_header(source, images, images_path, 3)
            (n_labels,) = _idx_header(source, labels, labels_path, 1)
            if n != n_labels:
                source.refuse(f"{_base(images_path)} has {n:,} images, {_base(labels_path)} has {n_labels:,} labels")
            size = height * width
            if size > source.limits.pixels:
                source.at = f"{_base(images_path)} (byte 8)"
                source.refuse(
                    f"its header says {height:,} x {width:,} pixels an image, more than"
                    f" --max-megapixels {source.limits.pixels / 1e6:,.0f} allows"
                )
            _check_room(source, images, images_path, 16, n * size)
            _check_room(source, labels, labels_path, 8, n)
            at_once = max(1, min(RECORDS_AT_ONCE, PIECE_BYTES // size))
            for first in range(0, n, at_once):
                rows = min(at_once, n - first)
                source.at = f"{_base(images_path)} (byte {16 + first * size:,})"
                pixels = np.frombuffer(read_exactly(source, images, rows * size, f"its {n:,} images"), np.uint8)
                source.at = f"{_base(labels_path)} (byte {8 + first:,})"
                values = np.frombuffer(read_exactly(source, labels, rows, f"its {n:,} labels"), np.uint8)
                classes = max(classes, int(values.max()) + 1)
                for i, (image, label) in enumerate(
                    zip(pixels.reshape(rows, 1, height, width), values, strict=True), first
                ):
                    yield RawImage(split, image, int(label), f"{_base(images_path)}[{i}]")
            for path, stream in ((images_path, images), (labels_path, labels)):
                source.at = _base(path)
                if stream.read(1):
                    source.refuse("goes on after the last of the items that its header counts")
    return tuple(str(label) for label in range(classes))


def idx_pairs(source: Source) -> dict[str, tuple[str, str | None]]:
    """split -> (images file, labels file)."""
    folder = source.path.rpartition("/")[0] if "-idx3-ubyte" in _base(source.path) else source.path.rstrip("/")
    pairs: dict[str, tuple[str, str | None]] = {}
    for stem, split in (("train", "train"), ("t10k", "test")):
        found = []
        for kind in ("images-idx3", "labels-idx1"):
            paths = [f"{folder}/{stem}-{kind}-ubyte{suffix}" for suffix in ("", ".gz")]
            own = [p for p in paths if source.own is None or _base(p) in source.own]
            found.append(next((p for p in own if source.fs.get_file_info(p).type == pafs.FileType.File), None))
        if found[0]:
            pairs[split] = (found[0], found[1])
    return pairs


def _idx_header(source: Source, stream: IO[bytes], path: str, dimensions: int) -> tuple[int, ...]:
    source.at = f"{_base(path)} (byte 0)"
    head = read_exactly(source, stream, 4 * (1 + dimensions), "an IDX header")
    magic, *sizes = struct.unpack(f">{1 + dimensions}I", head)
    if magic != 0x800 + dimensions:  # 0x08: unsigned bytes
        source.refuse(f"begins with the number {magic:#010x}, an IDX file of this kind with {0x800 + dimensions:#010x}")
    if not all(sizes):
        source.refuse(f"its header counts nothing: {' x '.join(map(str, sizes))}")
    return tuple(sizes)


def _check_room(source: Source, stream: IO[bytes], path: str, header: int, items: int) -> None:
    room = source.room(path, stream)
    if room is not None and header + items > room:
        source.at = f"{_base(path)} (byte {header})"
        short = header + items - room
        source.refuse(f"ends at least {short:,} bytes short of the {items:,} that its header counts")


def _base(path: str) -> str:
    return path.rpartition("/")[2]
