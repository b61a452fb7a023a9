"""Zips of many files, each read by itself in the order in which they lie, from whatever can be jumped in.

The directory at the end is parsed by `zipfile`; members are read here, for it would ask three times for each of them,
and a store answers some hundred times a second. Nothing is unpacked to disk, and no name becomes a path.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pyarrow as pa

from pipelines.data.sources_io import FETCH, UNPACKED_FLOOR, Source, read_exactly

DIRECTORY_BYTES = 40 << 20
"""Of the list of members, which is held whole. That of the 202,599 images of CelebA has 15 MB and more."""

_HEADER = 30  # bytes before the name
_ENCRYPTED = 0x41  # flags of either kind of it
_UTF8 = 0x800
_ELSEWHERE = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)")


class DamagedMemberError(Exception):
    """Why the bytes of one member cannot be had, where the archive around it is whole."""


@contextmanager
def open_zip(source: Source, path: str) -> Iterator[tuple[IO[bytes], list[zipfile.ZipInfo]]]:
    """The bytes of the zip, and its files in the order in which they lie; refused where they do not fit into it."""
    name = path.rpartition("/")[2]
    with source.fs.open_input_file(path) as file:
        source.at = name
        try:
            with zipfile.ZipFile(_Bounded(source, file)) as archive:
                end, members = archive.start_dir, archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, _OutsideError) as error:
            source.refuse(f"is no whole zip ({' '.join(str(error).split())}): cut off or damaged, fetch it again")
        members = sorted((m for m in members if not m.is_dir()), key=lambda member: member.header_offset)
        _check(source, name, members, end)
        source.at = name
        yield io.BufferedReader(_Jumping(source, file), FETCH), members  # in which short jumps cost nothing


def _check(source: Source, name: str, members: list[zipfile.ZipInfo], end: int) -> None:
    """Everything that the directory tells, before a byte of a member is believed."""
    before = 0
    for member in members:
        source.at = f"{name}, {member.filename}"
        if _ELSEWHERE.match(member.orig_filename):
            source.refuse("is a name that leads out of the archive, which nobody packs in good faith")
        if member.flag_bits & _ENCRYPTED:
            source.refuse("is encrypted; unpack it with its password and pack it again without")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            source.refuse(f"is packed by method {member.compress_type}; stored and deflated members are read")
        if member.header_offset < before:
            source.refuse("begins within the member before it: damaged, or made to unpack to more than there is")
        before = member.header_offset + _HEADER + member.compress_size
        if before > end:
            source.refuse("goes on beyond the end of the archive: cut off or damaged, fetch it again")
    source.at = name
    if sum(member.file_size for member in members) > max(UNPACKED_FLOOR, source.limits.ratio * end):
        source.refuse(
            f"its {end:,} bytes unpack to more than {source.limits.ratio:,} times as many;"
            " if they are meant to, raise --max-ratio"
        )


def read_member(source: Source, stream: IO[bytes], member: zipfile.ZipInfo) -> bytes:
    """All of it; `DamagedMemberError` when it is not what was packed. The caller has looked at its sizes."""
    stream.seek(member.header_offset)
    header = read_exactly(source, stream, _HEADER, "the header of a member")
    mark, name_bytes, extra_bytes = struct.unpack("<4s22xHH", header)
    name = read_exactly(source, stream, name_bytes + extra_bytes, "the header of a member")[:name_bytes]
    if mark != b"PK\3\4" or name != member.orig_filename.encode("utf-8" if member.flag_bits & _UTF8 else "cp437"):
        source.refuse("stands in the directory, and is not where that says: damaged, fetch it again")
    data = read_exactly(source, stream, member.compress_size, f"its {member.compress_size:,} bytes")
    if member.compress_type == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflate.decompress(data, member.file_size + 1)
        except zlib.error as error:
            raise DamagedMemberError(f"it cannot be unpacked ({error})") from error
    if len(data) != member.file_size:
        raise DamagedMemberError(f"it does not unpack to the {member.file_size:,} bytes that the directory says")
    if zlib.crc32(data) != member.CRC:
        raise DamagedMemberError("its bytes are not those that were packed (CRC-32)")
    return data


class _OutsideError(OSError):
    """A jump to before the file: `zipfile` tries some, and knows them by `OSError`."""


class _Jumping(io.RawIOBase):
    """A file of pyarrow that tells the source how many bytes of it have gone by."""

    def __init__(self, source: Source, file: pa.NativeFile) -> None:
        super().__init__()
        self._source, self._file = source, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            self._file.seek(offset, whence)
        except (ValueError, OverflowError) as error:
            raise _OutsideError(*error.args) from error
        return self.tell()

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size: int = self._file.readinto(buffer)
        self._source.bytes_read += size
        return size


class _Bounded(io.BufferedReader):
    """For `zipfile`, which asks for a directory as large as the archive claims: no more than it may have."""

    def __init__(self, source: Source, file: pa.NativeFile) -> None:
        super().__init__(_Jumping(source, file), FETCH)
        self._source, self._size = source, int(file.size())

    def read(self, size: int | None = -1) -> bytes:
        wanted = self._size - self.tell() if size is None or size < 0 else size
        if wanted > DIRECTORY_BYTES:
            self._source.refuse(
                f"its directory would have {wanted:,} bytes, more than the {DIRECTORY_BYTES:,} that are read"
            )
        return super().read(wanted)  # what is not there is not read
