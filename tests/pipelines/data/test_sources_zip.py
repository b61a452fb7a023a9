"""Archives of CelebA that are damaged, foreign or hostile: told in a sentence, or a bad image where only one is."""

from __future__ import annotations

import struct
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import sources_zip
from pipelines.data.images import Bad, prepare
from pipelines.data.sources_io import BadFile, EncodedImage, Limits, Source
from pipelines.errors import FigmentError
from tests.pipelines.data import archives
from tests.pipelines.data.archives import local, zip_of
from tests.pipelines.data.test_sources_celeba import ATTRIBUTES, FILES, HAS, PARTS, ZIP, members, read, refused

FIRST, SECOND = "img_align_celeba/000001.jpg", "img_align_celeba/000002.jpg"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return archives.celeba(tmp_path / "celeba", FILES, HAS, PARTS)


def sound(source: Source) -> tuple[list[bytes], list[BadFile]]:
    found = read(source)
    good = [bytes(image.data) for image in found if isinstance(image, EncodedImage)]
    return good, [image for image in found if isinstance(image, BadFile)]


def patched(path: Path, name: str, at: int, form: str, value: int, local_at: int | None = None) -> None:
    """A number of a member's entry in the directory, and of its own header where it stands there too."""
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2", 0, data.rindex(name.encode()))
    struct.pack_into(form, data, entry + at, value)
    if local_at is not None:
        struct.pack_into(form, data, struct.unpack_from("<I", data, entry + 42)[0] + local_at, value)
    path.write_bytes(data)


# --- read all the same ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip64_and_what_stands_before_an_archive_are_read(
    folder: Path, method: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an archive of more than 65,535 members, which CelebA's is."""
    plain = zip_of(folder / ZIP, members(), method).read_bytes()
    assert sorted(sound(local(folder))[0]) == sorted(FILES)
    (folder / ZIP).write_bytes(b"#!/bin/sh\n" * 50 + plain)
    assert sorted(sound(local(folder))[0]) == sorted(FILES)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    data = zip_of(folder / ZIP, members(), method).read_bytes()
    monkeypatch.undo()
    assert b"PK\6\6" in data and b"PK\6\7" in data and len(data) > len(plain)
    assert sorted(sound(local(folder))[0]) == sorted(FILES)
    for damaged in (data.replace(b"PK\6\6", b"PK\6\5"), data.replace(b"PK\1\2", b"PK\1\3"), data[:-30]):
        (folder / ZIP).write_bytes(damaged)
        refused(local(folder), ZIP)


def test_members_are_fetched_in_large_pieces(folder: Path) -> None:
    """An object store answers each request; a small archive takes one for the members."""
    source, asked = local(folder), []

    class Asked(sources_zip._Jumping):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            asked.append(len(buffer))
            return super().readinto(buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_zip, "_Jumping", Asked)
        read(source)
    assert len([size for size in asked if size >= 1 << 20]) <= 6 and len(asked) <= 12


# --- one image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: patched(path, SECOND, 16, "<I", 1234), "its bytes are not those that were packed (CRC-32)"),
        (lambda path: patched(path, SECOND, 24, "<I", 100_000), "does not unpack to the 100,000 bytes"),
        (lambda path: patched(path, SECOND, 24, "<I", 5), "does not unpack to the 5 bytes"),
        (lambda path: patched(path, SECOND, 24, "<I", 65_000_000), "has 65,000,000 bytes, more than --max-file-mb 64"),
        (lambda path: patched(path, SECOND, 10, "<H", 0), "does not unpack to the"),
    ],
)
def test_one_member_that_is_not_what_was_packed_is_a_bad_image(
    folder: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(folder / ZIP)
    good, bad = sound(local(folder))
    assert sorted(good) == sorted(FILES[:1] + FILES[2:])
    assert [image.split for image in bad] == ["test"] and reason in bad[0].reason
    assert SECOND in bad[0].member and ZIP in bad[0].member


def test_damaged_bytes_of_one_member_are_a_bad_image(folder: Path) -> None:
    data = bytearray((folder / ZIP).read_bytes())
    at = data.index(SECOND.encode()) + len(SECOND)
    data[at + 1 : at + 20] = bytes(19)
    (folder / ZIP).write_bytes(data)
    good, bad = sound(local(folder))
    assert len(good) == 6 and len(bad) == 1 and bad[0].reason.startswith("it ") and SECOND in bad[0].member


def test_an_image_that_is_none_is_bad_when_it_is_decoded(folder: Path) -> None:
    zip_of(folder / ZIP, members() | {SECOND: b"<html>404</html>"})
    row = next(image for image in read(local(folder)) if SECOND in image.member)
    (bad,) = prepare([row], 16, "raw", crop=20)
    assert isinstance(bad, Bad) and "no JPEG" in bad.reason and SECOND in bad.member


def test_a_bomb_is_not_unpacked_beyond_what_it_claims(folder: Path) -> None:
    """60 MB of zeros in 60 KB, claimed to be 100 bytes, or what they are, which --max-file-mb forbids."""
    zip_of(folder / ZIP, members() | {SECOND: bytes(60_000_000)})
    tracemalloc.start()
    try:
        for limits, claims in ((Limits(), 100), (Limits(file_bytes=1_000_000), 60_000_000)):
            patched(folder / ZIP, SECOND, 24, "<I", claims)
            good, bad = sound(local(folder, limits=limits))
            assert len(good) == 6 and len(bad) == 1
        assert tracemalloc.get_traced_memory()[1] < 30e6, "buffers of 8 MB of the archive among it"
    finally:
        tracemalloc.stop()


# --- the archive ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: patched(path, SECOND, 8, "<H", 1), [f"{SECOND}: is encrypted"]),
        (lambda path: patched(path, SECOND, 8, "<H", 0x41), [f"{SECOND}: is encrypted"]),
        (lambda path: zip_of(path, members(), zipfile.ZIP_BZIP2), ["is packed by method 12"]),
        (lambda path: patched(path, SECOND, 42, "<I", 70), ["begins within the member before it"]),
        (lambda path: patched(path, SECOND, 42, "<I", 10**6), [f"{SECOND}: goes on beyond the end of the archive"]),
        (lambda path: patched(path, SECOND, 20, "<I", 2**31), [f"{SECOND}: goes on beyond"]),
        (lambda path: patched(path, "000007.jpg", 42, "<I", 2**32 - 1), ["000007.jpg: goes on beyond"]),
        (lambda path: patched(path, SECOND, 8, "<H", 0x800), []),
        (lambda path: path.write_bytes(b""), ["is no whole zip"]),
        (lambda path: path.write_bytes(b"<!doctype html>Google Drive - Virus scan warning" * 90), ["is no whole zip"]),
        (lambda path: path.write_bytes(archives.tar_bytes(members())), ["is no whole zip"]),
        (lambda path: zip_of(path, {}), ["lacks 000001.jpg", "and 6 more; fetch it again"]),
        (lambda path: zip_of(path, dict([*members().items()][2:])), ["lacks 000001.jpg", "and 1 more"]),
        (lambda path: zip_of(path, members() | {"img_align_celeba/000008.jpg": b"x"}), [f"has no row in {ATTRIBUTES}"]),
        (lambda path: zip_of(path, members() | {"img_align_celeba/cat.PNG": b"x"}), [f"has no row in {ATTRIBUTES}"]),
        (lambda path: zip_of(path, members() | {"other/000002.jpg": b"x"}), ["is the second image of that name"]),
        (lambda path: zip_of(path, members() | {"/etc/000008.jpg": b"x"}), ["leads out of the archive"]),
        (lambda path: zip_of(path, members() | {"../000008.jpg": b"x"}), ["leads out of the archive"]),
        (lambda path: zip_of(path, members() | {"a/../../x": b"x"}), ["leads out of the archive"]),
        (lambda path: zip_of(path, members() | {"a\\..\\x": b"x"}), ["leads out of the archive"]),
        (lambda path: zip_of(path, members() | {"C:\\x": b"x"}), ["leads out of the archive"]),
    ],
)  # fmt: skip
def test_an_archive_that_is_something_else_is_refused(
    folder: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(folder / ZIP)
    if words:
        refused(local(folder), ZIP, *words)
    else:
        assert sorted(sound(local(folder))[0]) == sorted(FILES)


def test_a_member_that_is_not_where_the_directory_says_is_refused(folder: Path) -> None:
    whole = (folder / ZIP).read_bytes()
    at = whole.index(SECOND.encode())
    for data in (
        whole[: at - 30] + b"PK\3\5" + whole[at - 26 :],
        whole[:at] + b"img_align_celeba/000009.jpg" + whole[at + len(SECOND) :],
    ):
        (folder / ZIP).write_bytes(data)
        refused(local(folder), f"{ZIP}, {SECOND}", "is not where that says: damaged")


def test_two_members_of_one_name_are_refused(folder: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(folder / ZIP, "a") as archive:
        archive.writestr(SECOND, b"x")
    refused(local(folder), f"{ZIP}, {SECOND}: is the second image of that name")


def test_an_archive_that_is_cut_off_anywhere_is_refused(folder: Path) -> None:
    data = (folder / ZIP).read_bytes()
    for cut in [*range(0, len(data) - 400, 211), *range(len(data) - 400, len(data))]:
        (folder / ZIP).write_bytes(data[:cut])
        refused(local(folder), ZIP, "is no whole zip")


def test_what_all_members_claim_together_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in members():
        patched(folder / ZIP, name, 24, "<I", 60_000_000)
    monkeypatch.setattr(sources_zip, "UNPACKED_FLOOR", 400_000_000)
    refused(local(folder), f"{ZIP}: its ", "unpack to more than 200 times as many", "--max-ratio")
    assert len(sound(local(folder, limits=Limits(ratio=10**6)))[1]) == 7


def test_a_directory_is_not_read_however_long_it_claims_to_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 MB of a file with holes, of which its end says that all is directory."""
    with (folder / ZIP).open("r+b") as file:
        file.truncate(80_000_000)
        file.seek(0, 2)
        file.write(b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 1, 1, 79_999_000, 1000, 0))
    tracemalloc.start()
    try:
        refused(local(folder), f"{ZIP}: its directory would have 79,999,000 bytes, more than the 41,943,040")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@settings(max_examples=150)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_directories_are_refused_or_read_and_never_crash(edits: list[tuple[float, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = archives.celeba(Path(name), [b"a", b"bb"], HAS[:2], (0, 2))
        data = bytearray((folder / ZIP).read_bytes())
        start = data.index(b"PK\3\4", 10)
        for at, value in edits:
            data[start + int(at * (len(data) - start))] = value
        (folder / ZIP).write_bytes(data)
        try:
            good, bad = sound(local(folder))
            assert set(good) <= {b"a", b"bb"} and len(good) + len(bad) == 2
        except FigmentError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
