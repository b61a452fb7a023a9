"""Tars are read as Python's `tarfile` reads them, in one pass."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.sources_tar import _StrictTarInfo, tar_members
from tests.pipelines.data.archives import local, tar_bytes


def read(data: bytes) -> list[tuple[str, int, bytes]]:
    members = tar_members(local(Path("any.tar")), io.BytesIO(data))
    return [(member.name, member.offset, member.stream.read(member.size)) for member in members]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int) -> None:
    sink = io.BytesIO()
    rng = np.random.default_rng(0)
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        for name in ("a", "d/" + "n" * 98, "d/" * 60 + "x", "ü.JPEG", "b" * 99, "c" * 100):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = int(rng.integers(2_000)), 10**9
            tar.addfile(info, io.BytesIO(rng.bytes(info.size)))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with tarfile.open(fileobj=io.BytesIO(sink.getvalue())) as tar:
        files = [info for info in tar if info.isfile()]
        wanted = [(info.name, info.offset_data, tar.extractfile(info).read()) for info in files]  # type: ignore[union-attr]
    assert len(wanted) == 6 and read(sink.getvalue()) == wanted


def test_what_is_not_read_of_a_member_is_passed_over() -> None:
    data = tar_bytes({"a": b"1" * 3_000_000, "b": b"23"})
    members = tar_members(local(Path("any.tar")), io.BytesIO(data))
    assert next(members).stream.read(5) == b"11111"
    assert next(members).stream.read(5) == b"23"


def test_a_member_cannot_be_read_after_the_next() -> None:
    first, second = tar_members(local(Path("any.tar")), io.BytesIO(tar_bytes({"a": b"1", "b": b"2"})))
    assert second.name == "b"
    with pytest.raises(tarfile.StreamError, match="another member has been read since"):
        first.stream.read(1)


def test_the_short_way_through_a_header_sees_what_tarfile_sees() -> None:
    """Over headers as they are, and with a byte changed whose sum is set right or is not."""
    rng = np.random.default_rng(0)
    short = 0
    for _ in range(1_500):
        info = tarfile.TarInfo("d/" + "x" * int(rng.integers(1, 130)))
        info.size = int(rng.integers(0, 2**34))  # from 2**33 on not octal any more
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
        if rng.random() < 0.7:
            header[rng.choice([int(rng.integers(512)), 0, 99, 124, 135, 156, 345])] = rng.choice([0, 47, 48, 83, 255])
        if rng.random() < 0.7:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        plain = _StrictTarInfo._plain(header)
        if plain is not None:
            short += 1
            try:
                wanted = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:  # owner, time and the like are no numbers; nobody asks for them
                assert (
                    "checksum" not in str(error) and plain.isreg() and sum(header[100:124]) + sum(header[136:148]) != 0
                )
                continue
            assert (plain.name, plain.size, plain.type) == (wanted.name, wanted.size, wanted.type)
    assert short > 400


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_is_refused_for_its_contents_are_elsewhere(kind: bytes) -> None:
    """tar itself makes one of the second of two files that are one on the disk."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        info = tarfile.TarInfo("a.JPEG")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("b.JPEG")
        link.type, link.linkname = kind, "a.JPEG"
        tar.addfile(link)
    with pytest.raises(tarfile.ReadError, match=r"it is a link.*--hard-dereference"):
        read(sink.getvalue())


def test_a_header_whose_sum_is_wrong_is_damaged() -> None:
    data = bytearray(tar_bytes({"a.JPEG": b"1"}))
    data[0] = ord("b")
    with pytest.raises(tarfile.ReadError, match=r"no tar header at byte 0 \(bad checksum\)"):
        read(bytes(data))
