"""Tars, read once from front to back, one in another too; a damaged or cut off one is told from one that has ended."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NoReturn, Self, cast

from pyarrow import fs as pafs

from pipelines.data.sources_io import CHUNK, UNPACK, Readable, Source, read_exactly, too_large

GLOBAL_HEADERS = 1000  # entries
HEADER_BYTES = 64 << 10  # of one extended tar header: long names and the like; `tarfile` holds it whole


@dataclass(frozen=True)
class Member:
    """One file of a tar."""

    name: str
    offset: int  # byte of the (decompressed) outermost tar at which its contents begin
    size: int
    stream: Part

    @property
    def base_name(self) -> str:
        return self.name.rpartition("/")[2]


class _Forward:
    """A stream with a position, as `tarfile` wants one. Its own for streams copies all there is in pieces of 10 KB."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._at = 0

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._at += len(data)
        return data

    def seek(self, position: int) -> None:
        if position < self._at:
            raise tarfile.StreamError("seeking backwards is not allowed")
        while self._at < position and self.read(min(CHUNK, position - self._at)):
            pass


class Part:
    """The contents of one member, while nothing behind them has been read."""

    def __init__(self, whole: _Forward, size: int) -> None:
        self._whole = whole
        self._at = whole.tell()
        self._end = self._at + size

    def read(self, size: int) -> bytes:
        if self._whole.tell() != self._at:
            raise tarfile.StreamError("another member has been read since")
        data = self._whole.read(min(size, self._end - self._at))
        self._at += len(data)
        return data


def tar_members(source: Source, stream: Readable, inside: Member | None = None) -> Iterator[Member]:
    """The files of a tar, one after the other; each must be read before the next is asked for.

    `inside`: the member of another tar that `stream` is. Stricter than `tarfile`, which takes a damaged header or a
    missing end for the end of the archive: here the archive must have its end mark and only zeros after it.
    """
    base = inside.offset if inside else 0
    outer = f"{inside.name}/" if inside else ""
    forward = _Forward(stream)
    with tarfile.TarFile(fileobj=cast("IO[bytes]", forward), tarinfo=_StrictTarInfo) as tar:
        while (info := tar.next()) is not None:
            vars(tar)["members"] = []  # tarfile would remember every member: 1 GB for ImageNet
            if len(tar.pax_headers) > GLOBAL_HEADERS:
                raise tarfile.ReadError(f"more than {GLOBAL_HEADERS} entries in its global headers")
            if info.islnk() or info.issym():
                source.at = outer + info.name
                raise tarfile.ReadError(_LINK)
            if not info.isfile():
                continue
            if info.issparse():
                raise tarfile.ReadError(_SPARSE)
            part = Part(forward, info.size)
            member = Member(outer + info.name, base + info.offset_data, info.size, part)
            source.at = f"{member.name} (byte {member.offset:,})"
            yield member
        source.at = inside.name if inside else ""
        while chunk := forward.read(CHUNK):  # to its end: only there a compressed stream checks its sum
            if chunk.count(0) != len(chunk):
                raise tarfile.ReadError(f"there is data after the end mark of the tar (byte {base + tar.offset:,})")


def member_names(source: Source) -> list[str]:
    """All files of the tar that `source` is, by jumping from header to header; empty where only a stream can be read.

    That is from the web, where each jump may fetch megabytes, and out of a compressed file.
    """
    if isinstance(source.fs, pafs.PyFileSystem):
        return []
    with source.fs.open_input_file(source.path) as file:
        if bytes(file.read(6)).startswith(tuple(UNPACK)):
            return []
        file.seek(0)
        names = []
        with tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:", tarinfo=_StrictTarInfo) as tar:
            while (info := tar.next()) is not None:
                vars(tar)["members"] = []
                names += [info.name] if info.isfile() else []
        return names


_SPARSE = "it has a sparse file, whose size is only claimed; pack it without --sparse"
_LINK = "it is a link, and what it stands for is elsewhere; pack it with --dereference --hard-dereference"
_NUMBERS = re.compile(rb"(?P<size>[0-7]{11})[\0 ].{12}(?P<sum>[0-7]{6}\0 )" + tarfile.REGTYPE, re.DOTALL)
"""Size, time, sum and type of a plain file as tar programs write them."""

_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _StrictTarInfo(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except (tarfile.HeaderError, ValueError, OverflowError, RecursionError) as error:
            if type(error).__name__ == "EOFHeaderError":  # the zero block that ends a whole archive
                raise
            raise tarfile.ReadError(f"no tar header at byte {tar.offset:,} ({error}): cut off or damaged") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if (plain := cls._plain(buf)) is not None:
            return plain
        info = super().frombuf(buf, encoding, errors)
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(_SPARSE)
        if info.size < 0 or (info.type in _EXTENDED and info.size > HEADER_BYTES):
            raise tarfile.ReadError(f"a header that claims {info.size:,} bytes")
        return info

    @classmethod
    def _plain(cls, buf: bytes | bytearray) -> Self | None:
        """A file with a short name, as nearly all are: no owners or times, for nobody asks, in a third of the time."""
        numbers = _NUMBERS.match(buf, 124)
        name = bytes(buf[:100]).split(b"\0", 1)[0]
        if numbers is None or len(buf) != tarfile.BLOCKSIZE or buf[345] or not name or not name.isascii():
            return None
        if int(numbers["sum"][:6], 8) != sum(buf) - sum(numbers["sum"]) + 8 * ord(" "):
            return None
        info = cls(name.decode("ascii"))
        info.size = int(numbers["size"], 8)
        return info

    def _proc_gnusparse_10(self, *_: object) -> NoReturn:  # its map may be as long as the archive
        raise tarfile.ReadError(_SPARSE)


def read_whole(source: Source, member: Member, allowed: int = 0) -> bytes:
    """All of a member that `Limits` let in, or that has no more than the `allowed` bytes of an official one."""
    if member.size > max(source.limits.file_bytes, allowed):
        source.refuse(too_large(member.size, source.limits))
    return read_exactly(source, member.stream, member.size, f"its {member.size:,} bytes")
