"""Arrays of numbers in files of MATLAB 5, read piece by piece; nothing of what a file claims is made room for.

SciPy's reader holds an array whole and makes objects of what it finds. Here the numbers of an array come in pieces, and
cells, structures, objects and text are named and refused.

A file: 128 bytes that end in version and byte order, then elements of a tag (type, bytes) and contents. An array is an
element of elements (flags, shape, name, numbers), as it is or packed by zlib; contents of up to 4 bytes lie in the tag.
Numbers may be stored in a smaller type than the array has. (MathWorks, "MAT-File Format", level 5.)
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass
from typing import IO

import numpy as np

from pipelines.data.sources_io import CHUNK, Readable, Source, read_exactly

HEADER = 128  # bytes
ARRAYS = 100  # in one file
DIMENSIONS = 8
NAME = 64  # bytes
PIECE = 64 << 10  # bytes of the file that are unpacked at once

_BYTES, _FLAGS, _SHAPE, _ARRAY, _PACKED = 1, 6, 5, 14, 15  # types of elements
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_OTHERS = {1: "a cell array", 2: "a structure", 3: "an object", 4: "text", 5: "a sparse array"}
_COMPLEX = 0x800


@dataclass(frozen=True)
class Array:
    """Where an array lies in its file, and what its header says."""

    name: str
    dtype: np.dtype | None  # None: its items are no real numbers
    what: str  # in words
    shape: tuple[int, ...]
    at: int  # the byte of the file at which its element begins
    size: int  # bytes of its element in the file
    packed: bool
    order: str  # of bytes: < or >

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class Numbers:
    """The numbers of an array one after the other, the first index running fastest."""

    def __init__(self, source: Source, stream: Readable, array: Array) -> None:
        """`stream` stands at the array's element, behind its tag of 8 bytes."""
        self._source, self._contents = source, _Contents(source, stream, array.size, array.packed)
        _header(source, self._contents, array.at, array.size, array.packed, array.order)
        kind, size, small = _tag(self._contents, array.order)
        self.dtype = np.dtype(array.order + _NUMBERS.get(kind, "u1"))
        if kind not in _NUMBERS or size != array.count * self.dtype.itemsize:
            source.refuse(f"holds {size:,} bytes of type {kind}, its header says {array.what}")
        self._small = None if small is None else io.BytesIO(small)

    def read(self, count: int) -> np.ndarray:
        """(count,): the next ones, as they are stored."""
        size = count * self.dtype.itemsize
        data = self._contents.read(size) if self._small is None else self._small.read(size)
        return np.frombuffer(data, self.dtype)

    def end(self) -> None:
        """After the last one: nothing but padding may follow, and a packed array must have its sum."""
        if len(self._contents.up_to(8)) == 8:
            self._source.refuse("goes on after the last of the numbers that its header counts")


def matlab_arrays(source: Source, file: IO[bytes], size: int | None) -> dict[str, Array]:
    """The arrays of a file of `size` bytes by name, of which only the headers are read; the file is jumped in."""
    order = _byte_order(source, file.read(HEADER))
    found: dict[str, Array] = {}
    at, whole = HEADER, source.at
    while tag := file.read(8):
        source.at = f"{whole} (byte {at:,})"
        if len(tag) < 8:
            source.refuse("ends within the tag of an array: the file is cut off, fetch it again")
        kind, length = struct.unpack(f"{order}2I", tag)
        if kind not in (_ARRAY, _PACKED):
            source.refuse(f"has an element of type {kind} where an array is expected: the file is damaged")
        if size is not None and at + 8 + length > size:
            source.refuse(
                f"ends {at + 8 + length - size:,} bytes short of an array: the file is cut off, fetch it again"
            )
        contents = _Contents(source, file, length, kind == _PACKED)
        array = _header(source, contents, at, length, kind == _PACKED, order)
        if array.name in found or len(found) == ARRAYS:
            source.refuse(f"has a second array {array.name!r}" if array.name in found else f"has over {ARRAYS} arrays")
        found[array.name] = array
        at += 8 + length
        file.seek(at)
    source.at = whole
    return found


def skip(source: Source, stream: Readable, array: Array) -> None:
    """From the begin of a file to where `Numbers` begins."""
    left = array.at + 8
    while left:
        left -= len(read_exactly(source, stream, min(CHUNK, left), "what stands before the array"))


class _Contents:
    """The contents of one element, unpacked when they are packed; held are a piece and what is asked for."""

    def __init__(self, source: Source, stream: Readable, size: int, packed: bool) -> None:
        self._source, self._stream = source, stream
        self._left = size  # bytes of the element that are not read yet
        self._unpack = zlib.decompressobj() if packed else None
        self._piece = b""

    def read(self, size: int) -> bytes:
        data = self.up_to(size)
        if len(data) < size:
            self._source.refuse(f"ends {size - len(data):,} bytes short of what its header counts: the file is damaged")
        return data

    def up_to(self, size: int) -> bytes:
        """`size` bytes, or those that are left."""
        if self._unpack is None:
            size = min(size, self._left)
            self._left -= size
            return read_exactly(self._source, self._stream, size, "an array")
        parts: list[bytes] = []
        while size and not self._unpack.eof:
            if not self._piece:
                n = min(PIECE, self._left)
                self._left -= n
                self._piece = read_exactly(self._source, self._stream, n, "an array")
            part = self._unpack.decompress(self._piece, size)
            if not part and not self._piece and not self._unpack.eof:
                self._source.refuse("a packed array ends too early: the file is damaged")
            self._piece = self._unpack.unconsumed_tail
            size -= len(part)
            parts.append(part)
        return b"".join(parts)


def _byte_order(source: Source, head: bytes) -> str:
    if head.startswith((b"\x89HDF", b"MATLAB 7.3")):
        source.refuse("is a file of MATLAB 7.3 (HDF5), the official ones are of MATLAB 5: save it with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(head[126:128])
    if order is None or struct.unpack(f"{order}H", head[124:126]) != (0x100,):
        source.refuse("is no file of MATLAB 5: its first 128 bytes end without version and byte order")
    return order


def _header(source: Source, contents: _Contents, at: int, size: int, packed: bool, order: str) -> Array:
    """Flags, shape and name; `contents` stands at the numbers then."""
    if packed and struct.unpack(f"{order}2I", contents.read(8))[0] != _ARRAY:
        source.refuse("something is packed that is no array: the file is damaged")
    flags = struct.unpack(f"{order}2I", _short(source, contents, order, _FLAGS, 8).ljust(8, b"\0"))[0]
    raw = _short(source, contents, order, _SHAPE, 4 * DIMENSIONS)
    shape = struct.unpack(f"{order}{len(raw) // 4}i", raw[: len(raw) // 4 * 4])
    name = _short(source, contents, order, _BYTES, NAME).decode("latin-1")
    if len(shape) < 2 or min(shape) < 0:
        source.refuse(f"array {name!r} has shape {shape}: the file is damaged")
    stored = _CLASSES.get(flags & 0xFF)
    dtype = None if stored is None or flags & _COMPLEX else np.dtype(stored)
    what = _OTHERS.get(flags & 0xFF, "no array of numbers") if stored is None else f"{np.dtype(stored)} {shape}"
    return Array(name, dtype, what + ", complex" * bool(flags & _COMPLEX), shape, at, size, packed, order)


def _tag(contents: _Contents, order: str) -> tuple[int, int, bytes | None]:
    """(type, bytes, the contents where they lie in the tag itself)."""
    head = contents.read(8)
    kind, size = struct.unpack(f"{order}2I", head)
    if kind >> 16:
        return kind & 0xFFFF, min(kind >> 16, 4), head[4 : 4 + min(kind >> 16, 4)]
    return kind, size, None


def _short(source: Source, contents: _Contents, order: str, expected: int, most: int) -> bytes:
    kind, size, data = _tag(contents, order)
    if kind != expected or size > most:
        source.refuse(f"an array has {size:,} bytes of type {kind} in its header: it is no plain one, or damaged")
    if data is None:
        data = contents.read(size)
        contents.read(-size % 8)
    return data
