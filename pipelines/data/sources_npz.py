"""Arrays that a script made: one `.npz` file of NumPy, believed only within `Limits`, of which nothing is unpickled.

    train/images uint8 (N, C, H, W)     train/labels int (N,), optional     test/images …     about.json uint8 (bytes,)

`about.json` is JSON in UTF-8, of which "labels" names the classes, and "columns" (optional) what else each row has:
`{"factors": ["azimuth", "light"]}` says that `SPLIT/factors` (N, 2) lies beside the images of each split. Other arrays
are left where they are.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from pyarrow import fs as pafs

from pipelines.data.columns import Column, ColumnError
from pipelines.data.sources_io import UNLABELLED, UNPACKED_FLOOR, Images, RawImage, Source, read_exactly

SPLITS = ("train", "test")
ABOUT_BYTES = 1 << 20
PIECE_BYTES = 8 << 20
LABELS = 1 << 24  # images of a split, whose labels are held in memory
COLUMN_BYTES = 1 << 28  # of a column of a split, held too


def npz_file(source: Source) -> str | None:
    """The path of the one `.npz` file that `source` is, or that lies alone in its folder."""
    info = source.fs.get_file_info(source.path)
    if info.type == pafs.FileType.Directory:
        files = source.files(source.path)
        return files[0].path if len(files) == 1 and files[0].path.endswith(".npz") else None
    return source.path if info.type == pafs.FileType.File and source.path.endswith(".npz") else None


def arrays(source: Source) -> Images:
    """`source` is the file, or a folder with nothing else in it."""
    path = npz_file(source)
    if path is None:
        source.refuse("is no .npz file, and no folder with one .npz file alone in it")
    with source.fs.open_input_file(path) as file, _zip(source, file) as archive:
        names, described = _about(source, archive)
        source.columns = tuple(_described(source, archive, name, entries) for name, entries in described.items())
        for split in SPLITS:
            if f"{split}/images.npy" in archive.namelist():
                yield from _split(source, archive, split, len(names))
        source.at = ""
        source.bytes_read = source.fs.get_file_info(path).size
    return names


def _split(source: Source, archive: zipfile.ZipFile, split: str, classes: int) -> Iterator[RawImage]:
    labels = _labels(source, archive, split, classes)
    columns = {column.name: _numbers(source, archive, split, column) for column in source.columns}
    with _array(source, archive, f"{split}/images", np.dtype(np.uint8)) as (stream, shape):
        if len(shape) != 4 or shape[1] not in (1, 3) or not all(shape):
            source.refuse(f"has shape {shape}, images are (N, 1 or 3, H, W)")
        n, *of_one = shape
        size = math.prod(of_one)
        if of_one[1] * of_one[2] > source.limits.pixels:
            source.refuse(
                f"its header says {of_one[1]:,} x {of_one[2]:,} pixels an image, more than"
                f" --max-megapixels {source.limits.pixels / 1e6:,.0f} allows"
            )
        if labels is not None and len(labels) != n:
            source.refuse(f"has {n:,} images, {split}/labels has {len(labels):,}")
        for name, values in columns.items():
            if len(values) != n:
                source.refuse(f"has {n:,} images, {split}/{name} has {len(values):,} rows")
        at_once = max(1, PIECE_BYTES // size)
        for first in range(0, n, at_once):
            rows = min(at_once, n - first)
            pixels = np.frombuffer(read_exactly(source, stream, rows * size, f"its {n:,} images"), np.uint8)
            for i, image in enumerate(pixels.reshape(rows, *of_one), first):
                label = UNLABELLED if labels is None else int(labels[i])
                of_row = {name: values[i] for name, values in columns.items()}
                yield RawImage(split, image, label, f"{split}/images[{i}]", of_row)
        _ended(source, stream)


def _labels(source: Source, archive: zipfile.ZipFile, split: str, classes: int) -> np.ndarray | None:
    if f"{split}/labels.npy" not in archive.namelist():
        return None
    with _array(source, archive, f"{split}/labels", None) as (stream, shape):
        dtype = stream.dtype
        if dtype.kind not in "iu" or len(shape) != 1 or shape[0] > LABELS:
            source.refuse(f"is an array of {dtype} {shape}, labels are at most {LABELS:,} whole numbers (N,)")
        data = read_exactly(source, stream, shape[0] * dtype.itemsize, f"its {shape[0]:,} labels")
        labels = np.frombuffer(data, dtype)
        wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= classes))
        if len(wrong):
            source.refuse(f"item {wrong[0]:,} is {labels[wrong[0]]}, about.json names {classes} labels")
        _ended(source, stream)
        return labels


def _about(source: Source, archive: zipfile.ZipFile) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Names of the classes; name of each column -> what its numbers are called."""
    if "about.json.npy" not in archive.namelist():
        source.refuse("has no array about.json: it is not one that `jobs.ingest` reads")
    with _array(source, archive, "about.json", np.dtype(np.uint8)) as (stream, shape):
        if len(shape) != 1 or shape[0] > ABOUT_BYTES:
            source.refuse(f"has shape {shape}, at most {ABOUT_BYTES:,} bytes of JSON are expected")
        data = read_exactly(source, stream, shape[0], "its text")
    try:
        about = json.loads(data)
        names, columns = about["labels"], about.get("columns", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        source.refuse(f'is no JSON object with "labels" ({type(error).__name__}: {error})')
    if not _is_names(names):
        source.refuse('its "labels" are no list of names')
    if not isinstance(columns, dict) or not all(_is_names(entries) for entries in columns.values()):
        source.refuse('its "columns" do not give each column a list of names')
    return tuple(names), columns


def _is_names(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def _described(source: Source, archive: zipfile.ZipFile, name: str, entries: list[str]) -> Column:
    """A column of about.json, of the type that the first split with images has it in."""
    there = archive.namelist()
    splits = [split for split in SPLITS if f"{split}/images.npy" in there]
    for split in splits:
        if f"{split}/{name}.npy" not in there:
            source.at = f"{split}/images"
            source.refuse(f"about.json describes a column {name[:40]!r}, and there is no array {split}/{name[:40]}")
    dtype = "float32"
    if splits:
        with _array(source, archive, f"{splits[0]}/{name}", None) as (stream, _):
            dtype = str(stream.dtype)
    try:
        return Column(name, tuple(entries), dtype)
    except ColumnError as error:
        source.refuse(str(error))


def _numbers(source: Source, archive: zipfile.ZipFile, split: str, column: Column) -> np.ndarray:
    """(N, width) of one column of a split."""
    with _array(source, archive, f"{split}/{column.name}", np.dtype(column.dtype)) as (stream, shape):
        size = math.prod(shape) * stream.dtype.itemsize
        if len(shape) != 2 or shape[1] != column.width or size > COLUMN_BYTES:
            source.refuse(
                f"has shape {shape}, about.json names {column.width} numbers a row: (N, {column.width}) of at most"
                f" {COLUMN_BYTES >> 20} MB is expected"
            )
        values = np.frombuffer(read_exactly(source, stream, size, f"its {shape[0]:,} rows"), stream.dtype)
        _ended(source, stream)
        return values.reshape(shape)


class _Member:
    """One array's bytes, after its header."""

    def __init__(self, stream: IO[bytes], dtype: np.dtype) -> None:
        self.dtype = dtype
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        return self._stream.read(size)


@contextmanager
def _array(
    source: Source, archive: zipfile.ZipFile, name: str, dtype: np.dtype | None
) -> Iterator[tuple[_Member, tuple[int, ...]]]:
    """(its bytes, its shape) of one array, refused where its type is another."""
    source.at = name
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > max(UNPACKED_FLOOR, source.limits.ratio * info.compress_size):
        source.refuse(
            f"{info.compress_size:,} bytes unpack to more than {source.limits.ratio:,} times as many;"
            " if they are meant to, raise --max-ratio"
        )
    with _told(source), archive.open(info) as stream:
        try:
            version = npy.read_magic(stream)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
            shape, fortran, found = read(stream) if read else ((), True, np.dtype(object))
        except (ValueError, EOFError) as error:
            source.refuse(f"is no NumPy array ({' '.join(str(error).split())[:200]})")
        if fortran or found.hasobject or (dtype is not None and found != dtype):
            order = "Fortran" if fortran else "C"
            source.refuse(f"is an array of {found} in {order} order, {dtype or 'numbers'} in C order are read")
        if any(length < 0 for length in shape):  # NumPy reads such a header
            source.refuse(f"its header counts {shape} items, of which a number is below 0")
        if math.prod(shape) * found.itemsize > info.file_size:
            source.refuse(f"its header counts {shape} items of {found}, more than its {info.file_size:,} bytes hold")
        yield _Member(stream, found), shape


def _ended(source: Source, stream: _Member) -> None:
    with _told(source):
        if stream.read(1):  # reading to the end also checks the sum of the member
            source.refuse("goes on after the last of the items that its header counts")


@contextmanager
def _zip(source: Source, file: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    with _told(source):
        archive = zipfile.ZipFile(file)
    with archive:
        yield archive


@contextmanager
def _told(source: Source) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        zlib.error,
        pa.ArrowInvalid,
    ) as error:  # also: an encrypted one
        source.refuse(f"is no whole .npz file ({' '.join(str(error).split())})")
