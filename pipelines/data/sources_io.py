"""What the source formats share: the records that they yield, and streams that fail with a file, a member and a byte.

Nothing here holds more than one member of an archive, and nothing is unpacked to disk. What a header claims is believed
only within `Limits`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pickle import PickleBuffer
from typing import IO, NoReturn, Protocol, SupportsIndex, cast

import numpy as np
from pyarrow import fs as pafs

from pipelines.data.columns import Column, Values
from pipelines.errors import FigmentError

UNLABELLED = -1
CHUNK = 1 << 20  # bytes
BUFFER = 128 << 10  # bytes
FETCH = 8 << 20  # bytes: an object store answers each read with one request, so few large ones
PILLOW_PIXELS = 178_000_000  # of an image that Pillow still opens
UNPACKED_FLOOR = 10**9  # bytes that any compressed file may unpack to, whatever its ratio


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Limits:
    """What a source may ask for; every image of ImageNet and every member of the official archives is far within."""

    file_bytes: int = 64_000_000  # of a member that is held whole: an image file, a pickle
    pixels: int = 100_000_000  # of one image; decoding takes 4 to 6 bytes of memory a pixel
    ratio: int = 200  # a compressed file to its contents (beyond UNPACKED_FLOOR), an image file to its pixels

    def __post_init__(self) -> None:
        if self.file_bytes < 1 or self.pixels < 1 or self.ratio < 1:
            raise FigmentError("limits of file size, pixels and ratio must be at least 1")
        if self.pixels > PILLOW_PIXELS:
            raise FigmentError(f"at most {PILLOW_PIXELS / 1e6:,.0f} megapixels can be allowed: Pillow decodes no more")


@dataclass(frozen=True)
class RawImage:
    """Pixels as they stand in the archive."""

    split: str
    pixels: np.ndarray  # uint8 (C, H, W)
    label: int
    member: str  # where it came from, for messages
    columns: Values = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedImage:
    """One image file (JPEG, PNG, …) out of an archive."""

    split: str
    data: bytes | memoryview
    label: int
    member: str
    columns: Values = field(default_factory=dict)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Its bytes go to a worker's memory as they are, without two copies of them on the way."""
        return EncodedImage, (self.split, PickleBuffer(self.data), self.label, self.member, self.columns)


@dataclass(frozen=True)
class ImageFile:
    """One image file that stands by itself: the worker that decodes it reads it too."""

    split: str
    path: str  # in the source's filesystem
    label: int
    member: str
    columns: Values = field(default_factory=dict)


@dataclass(frozen=True)
class BadFile:
    """An image file that is not even read."""

    split: str
    reason: str
    label: int
    member: str


SourceImage = RawImage | EncodedImage | ImageFile | BadFile
Images = Generator[SourceImage, None, tuple[str, ...]]
"""What a format is: its images, lazily, and at the end the names of its labels. One whose images have columns describes
them in `Source.columns` before it yields the first, for shards are written while it is read."""


UNPACK: dict[bytes, Callable[[IO[bytes]], io.BufferedIOBase]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"BZh": bz2.BZ2File,
}


@dataclass
class Source:
    """An archive or a folder to read, and how far the reading has come."""

    fs: pafs.FileSystem
    path: str
    name: str  # for messages and the manifest: the url, without credentials
    labels: tuple[str, ...] | None = None  # lines of a ground-truth file, for formats that keep labels apart
    labels_name: str = ""
    limits: Limits = field(default_factory=Limits)
    identity: str = ""  # of its contents, where it is published; else its files are told apart by size and time
    own: frozenset[str] | None = None  # names of those in the folder that are its own; None: all
    about: Mapping[str, object] = field(default_factory=dict)  # for the manifest
    columns: tuple[Column, ...] = field(default=(), init=False)  # that each of its images has, as its format found
    found: dict[str, object] = field(default_factory=dict, init=False)  # for the manifest too, by its format
    bytes_read: int = field(default=0, init=False)
    at: str = field(default="", init=False)  # the member that is being read

    def refuse(self, what: str) -> NoReturn:
        """Raises the error that names the file, the member and `what`."""
        raise FigmentError(f"{self.name}{f', {self.at}' if self.at else ''}: {what}")

    def size(self) -> int | None:
        """Bytes of the archive; None when it is a folder or its length is unknown."""
        return self.fs.get_file_info(self.path).size

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what the readers of streams and archives raise into one sentence."""
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, OSError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.refuse(f"cannot be read on after byte {self.bytes_read:,} of the file: {reason}")

    def open(self, path: str | None = None) -> IO[bytes]:
        """A sequential stream of the plain bytes of `path`: gzip, xz and bzip2 are recognised and decompressed."""
        counted = _Counted(self, self.fs.open_input_stream(path or self.path, compression=None))
        raw = io.BufferedReader(counted, FETCH)
        magic = raw.peek(6)[:6]
        unpack = next((opener for mark, opener in UNPACK.items() if magic.startswith(mark)), None)
        return raw if unpack is None else io.BufferedReader(_Unpacked(self, counted, unpack(raw)), BUFFER)

    def room(self, path: str, stream: IO[bytes]) -> int | None:
        """The most bytes that `stream`, which `open` made of `path`, can have; None when its length is unknown."""
        size = self.fs.get_file_info(path).size
        if size is None or not isinstance(getattr(stream, "raw", None), _Unpacked):
            return cast("int | None", size)
        return max(UNPACKED_FLOOR, self.limits.ratio * size)

    def files(self, folder: str) -> list[pafs.FileInfo]:
        """What lies directly in `folder`, by name; hidden entries are left out."""
        found = self.fs.get_file_info(pafs.FileSelector(folder))
        visible = (info for info in found if not info.base_name.startswith((".", "__MACOSX")))
        return sorted(visible, key=lambda info: info.base_name)


class _Counted(io.RawIOBase):
    """Reads a pyarrow stream and tells the source how many bytes of it have gone by."""

    def __init__(self, source: Source, stream: IO[bytes]) -> None:
        super().__init__()
        self._source = source
        self._stream = stream
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size: int = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        self.count += size
        self._source.bytes_read += size
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Unpacked(io.RawIOBase):
    """The contents of a compressed stream, as long as they are in proportion to what was read of it."""

    def __init__(self, source: Source, packed: _Counted, stream: io.BufferedIOBase) -> None:
        super().__init__()
        self._source, self._packed, self._stream = source, packed, stream
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read1(len(buffer))  # all that there is before an error
        buffer[: len(data)] = data
        self._count += len(data)
        if self._count > max(UNPACKED_FLOOR, self._source.limits.ratio * self._packed.count):
            self._source.refuse(
                f"{self._packed.count:,} bytes unpack to more than {self._source.limits.ratio:,} times as many;"
                " if they are meant to, raise --max-ratio"
            )
        return len(data)

    def close(self) -> None:
        self._stream.close()
        self._packed.close()
        super().close()


def read_exactly(source: Source, stream: Readable, size: int, what: str) -> bytes:
    """`size` bytes, or the error that says where `what` ended."""
    data = stream.read(size)
    if len(data) < size:
        source.refuse(f"ends {size - len(data):,} bytes short of {what}: the file is cut off, fetch it again")
    return data


def too_large(size: int, limits: Limits) -> str:
    return f"has {size:,} bytes, more than --max-file-mb {limits.file_bytes / 1e6:,.0f} allows"
