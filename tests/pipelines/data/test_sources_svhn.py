"""SVHN's files of MATLAB 5, as SciPy writes them; and every way in which one can be wrong."""

from __future__ import annotations

import functools
import http.server
import struct
import tempfile
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from infra.storage import open_source
from pipelines.data import sources_svhn
from pipelines.data.ingest import ingest
from pipelines.data.ingest_options import IngestOptions
from pipelines.data.sources import detect_format, fingerprint, read_images
from pipelines.data.sources_io import Limits, RawImage, Source
from pipelines.errors import FigmentError
from tests.pipelines.data import archives
from tests.pipelines.data.archives import Images, local, random_images

TRAIN, TEST, EXTRA = random_images(23, seed=1), random_images(7, seed=2), random_images(11, seed=3)


def read(source: Source) -> list[RawImage]:
    return [image for image in read_images(source, "svhn") if isinstance(image, RawImage)]


def rows(found: list[RawImage], split: str) -> list[tuple[bytes, int]]:
    return [(image.pixels.tobytes(), image.label) for image in found if image.split == split]


def in_order(images: Images) -> list[tuple[bytes, int]]:
    return [(p.tobytes(), int(n)) for p, n in zip(images.pixels, images.labels, strict=True)]


def refused(source: Source, *parts: str) -> None:
    with pytest.raises(FigmentError) as error:
        read(source)
    message = str(error.value)
    for part in (source.name, *parts):
        assert part in message, message
    assert "\n" not in message


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("labels", [np.uint8, np.float64, np.int32])
def test_the_splits_that_are_there(tmp_path: Path, packed: bool, labels: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_svhn, "IMAGES_AT_ONCE", 5)
    monkeypatch.setattr(sources_svhn, "LABELS_AT_ONCE", 4)
    folder = archives.svhn(tmp_path / "svhn", {"train": TRAIN, "test": TEST}, packed=packed, labels=labels)
    (folder / "readme.txt").write_text("not ours")
    assert detect_format(local(folder)) == "svhn"
    found = read(local(folder))
    assert rows(found, "train") == in_order(TRAIN) and rows(found, "test") == in_order(TEST)
    assert len(found) == 30 and found[0].pixels.shape == (3, 32, 32) and found[0].pixels.dtype == np.uint8
    assert found[24].member == "test_32x32.mat[1]"

    archives.svhn(folder, {"extra": EXTRA}, packed=packed)
    assert rows(read(local(folder / "test_32x32.mat")), "extra") == in_order(EXTRA), "what lies beside a named file"
    own = local(folder, own=frozenset({"train_32x32.mat", "test_32x32.mat"}))
    assert {image.split for image in read(own)} == {"train", "test"}


def test_pixels_stand_where_matlab_says(tmp_path: Path) -> None:
    """X(row, column, colour, image), each of them told by one bright pixel."""
    x = np.zeros((32, 32, 3, 2), np.uint8)
    x[3, 5, 1, 0], x[30, 2, 2, 1] = 255, 77
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": x, "y": np.array([[10], [4]])})
    first, second = read(local(tmp_path / "test_32x32.mat"))
    assert (first.pixels[1, 3, 5], second.pixels[2, 30, 2]) == (255, 77)
    assert (first.pixels > 0).sum() == (second.pixels > 0).sum() == 1
    assert (first.label, second.label) == (0, 4), "10 is the digit 0"


def test_names_and_the_fingerprint(tmp_path: Path) -> None:
    folder = archives.svhn(tmp_path / "svhn", {"train": TRAIN})
    images = read_images(local(folder), "svhn")
    with pytest.raises(StopIteration) as end:
        while True:
            next(images)
    assert end.value.value == tuple("0123456789")
    ways = (folder, folder / "train_32x32.mat")
    before = [fingerprint(local(way)) for way in ways]
    (folder / "other.txt").write_text("x")
    assert [fingerprint(local(way)) for way in ways] == before
    archives.svhn(folder, {"extra": EXTRA})
    assert all(fingerprint(local(way)) != old for way, old in zip(ways, before, strict=True))


def test_an_ingest_has_a_split_for_each_file_and_holds_one_at_a_time(store: pafs.FileSystem, tmp_path: Path) -> None:
    splits = {"train": random_images(40), "test": random_images(30), "extra": random_images(50)}
    folder = archives.svhn(tmp_path / "svhn", splits)
    result = ingest(local(folder), store, IngestOptions("svhn", rows_per_shard=60))
    assert {split: result.manifest.rows(split) for split in splits} == {"train": 40, "test": 30, "extra": 50}
    assert result.manifest.label_names == tuple("0123456789") and result.manifest.image_shape == (3, 32, 32)
    assert result.most_held <= 50 * 3072
    assert result.manifest.source["format"] == "svhn" and "Netzer" in str(result.manifest.source["citation"])


def test_any_order_and_either_byte_order_are_read(tmp_path: Path) -> None:
    """Arrays put together by hand from the description of the format."""
    for order in "<>":
        for arrays in (("X", "y", "more"), ("more", "y", "X")):
            (tmp_path / "test_32x32.mat").write_bytes(file_of(order, *(parts(order, TEST)[name] for name in arrays)))
            assert rows(read(local(tmp_path / "test_32x32.mat")), "test") == in_order(TEST)


def element(order: str, kind: int, data: bytes) -> bytes:
    return struct.pack(f"{order}2I", kind, len(data)) + data + bytes(-len(data) % 8)


def array(order: str, name: str, kind: int, shape: tuple[int, ...], stored: int, data: bytes, flags: int = 0) -> bytes:
    return element(
        order,
        14,
        element(order, 6, struct.pack(f"{order}2I", kind | flags, 0))
        + element(order, 5, struct.pack(f"{order}{len(shape)}i", *shape))
        + element(order, 1, name.encode())
        + element(order, stored, data),
    )


def parts(order: str, images: Images) -> dict[str, bytes]:
    digits = np.where(images.labels == 0, 10, images.labels)
    pixels = np.ascontiguousarray(images.pixels.swapaxes(2, 3)).tobytes()
    n = len(digits)
    return {
        "X": array(order, "X", 9, (32, 32, 3, n), 2, pixels),
        "y": array(order, "y", 6, (n, 1), 4, digits.astype(f"{order}u2").tobytes()),
        "more": array(order, "a much longer name", 6, (1, 2), 9, np.array([1.5, 2.5], f"{order}f8").tobytes()),
    }


def file_of(order: str, *arrays: bytes) -> bytes:
    mark = b"IM" if order == "<" else b"MI"
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x100) + mark + b"".join(arrays)


def packed(data: bytes) -> bytes:
    small = zlib.compress(data)
    return struct.pack("<2I", 15, len(small)) + small


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    x, y = parts("<", TEST)["X"], parts("<", TEST)["y"]
    n, pixels = len(TEST.labels), bytes(7 * 3072)
    for data, *words in (
        (b"", "is no file of MATLAB 5"),
        (b"<!doctype html><title>404</title>" * 10, "is no file of MATLAB 5"),
        (b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n", "MATLAB 7.3 (HDF5)", "-v7"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "MATLAB 7.3 (HDF5)"),
        (file_of("<"), "has the arrays none, SVHN has X and y"),
        (file_of("<", x), "has the arrays X, SVHN has X and y"),
        (file_of("<", x, y, x), "has a second array 'X'"),
        (file_of("<", x, element("<", 2, b"12345678")), "element of type 2 where an array is expected"),
        (file_of("<", packed(element("<", 2, b"12345678"))), "packed that is no array"),
        (file_of("<", array("<", "X", 9, (32, 32, 3), 2, bytes(3072)), y), "array X: is uint8 (32, 32, 3), images"),
        (file_of("<", array("<", "X", 9, (32, 32, 1, n), 2, bytes(n << 10)), y), "is uint8 (32, 32, 1, 7), images"),
        (file_of("<", array("<", "X", 9, (32, 32, 3, 0), 2, b""), y), "is uint8 (32, 32, 3, 0), images"),
        (file_of("<", array("<", "X", 9, (32, 32, 3, -n), 2, pixels), y), "has shape (32, 32, 3, -7)"),
        (file_of("<", array("<", "X", 8, (32, 32, 3, n), 1, pixels), y), "is int8 (32, 32, 3, 7), images"),
        (file_of("<", array("<", "X", 9, (32, 32, 3, n), 1, pixels), y), "pixels are stored as int8"),
        (file_of("<", array("<", "X", 9, (32, 32, 3, n), 2, pixels, 0x800), y), "complex, images are"),
        (file_of("<", array("<", "X", 1, (32, 32, 3, n), 14, pixels), y), "is a cell array, images are"),
        (file_of("<", array("<", "X", 2, (32, 32, 3, n), 14, pixels), y), "is a structure, images are"),
        (file_of("<", array("<", "X", 3, (32, 32, 3, n), 14, pixels), y), "is an object, images are"),
        (file_of("<", array("<", "X", 17, (32, 32, 3, n), 14, pixels), y), "is no array of numbers, images are"),
        (file_of("<", array("<", "X", 9, (32, 32, 3, n), 2, pixels[:-8]), y), "holds 21,496 bytes of type 2"),
        (file_of("<", array("<", "X", 9, (32, 32, 3, n), 2, pixels + bytes(8)), y), "holds 21,512 bytes of type 2"),
        (file_of("<", array("<", "X" * 70, 9, (32, 32, 3, n), 2, pixels), y), "has 70 bytes of type 1 in its header"),
        (file_of("<", array("<", "X", 9, (1,) * 9, 2, b"1"), y), "has 36 bytes of type 5 in its header"),
        (file_of("<", x, array("<", "y", 9, (n - 1, 1), 2, bytes(n - 1))), "array y: is uint8 (6, 1), the labels of 7"),
        (file_of("<", x, array("<", "y", 4, (n, 1), 2, bytes(n))), "array y: is text, the labels of 7"),
        (file_of("<", x, array("<", "y", 9, (n, 1), 2, b"\1\2\0\4\5\6\7")), "item 2 is 0, labels are 1 … 10"),
        (file_of("<", x, array("<", "y", 9, (n, 1), 2, b"\1\2\3\4\5\6\x0b")), "item 6 is 11, labels"),
        (file_of("<", x, array("<", "y", 6, (n, 1), 9, np.full(n, 1.5).tobytes())), "item 0 is 1.5, labels"),
        (file_of("<", x, array("<", "y", 6, (n, 1), 9, np.full(n, np.nan).tobytes())), "item 0 is nan, labels"),
        (file_of("<", x, array("<", "y", 9, (n, 1), 7, bytes(n))), "holds 7 bytes of type 7"),
        (file_of("<", *(array("<", f"v{i}", 9, (1, 1), 2, b"1") for i in range(101))), "has over 100 arrays"),
    ):
        path.write_bytes(data)
        refused(local(path), "train_32x32.mat", *words)
    path.unlink()
    refused(local(tmp_path), "has no file {train,test,extra}_32x32.mat")


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_file_that_is_cut_off_anywhere_or_goes_on(tmp_path: Path, is_packed: bool) -> None:
    path = archives.svhn(tmp_path / "svhn", {"train": TEST}, packed=is_packed) / "train_32x32.mat"
    data = path.read_bytes()
    for cut in [*range(0, 300, 7), *range(300, len(data) - 1, 997), len(data) - 1]:
        path.write_bytes(data[:cut])
        refused(local(path), "train_32x32.mat")
    path.write_bytes(data + b"1234")
    refused(local(path), "ends within the tag of an array")


def test_packed_arrays_that_are_damaged_or_go_on(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    x, y = parts("<", TEST)["X"], parts("<", TEST)["y"]
    small = zlib.compress(x)
    for damaged, words in (
        (small[:-1] + bytes([small[-1] ^ 1]), "incorrect data check"),
        (small[:-4], "ends too early"),
        (zlib.compress(x + bytes(8)), "goes on after the last of the numbers"),
        (zlib.compress(x[:-8]), "ends 8 bytes short"),
        (b"no zlib at all", "incorrect header check"),
    ):
        path.write_bytes(file_of("<", struct.pack("<2I", 15, len(damaged)) + damaged, packed(y)))
        refused(local(path), words)
    path.write_bytes(file_of("<", packed(x), packed(y)))
    assert rows(read(local(path)), "train") == in_order(TEST)


def test_a_bomb_is_refused_by_what_it_claims_or_read_in_pieces(tmp_path: Path) -> None:
    """60 MB of zeros in 60 KB: within 1 GB it is read, a few megabytes at a time; beyond, its header is enough."""
    n, path = 20_000, tmp_path / "train_32x32.mat"
    y = packed(array("<", "y", 9, (n, 1), 2, b"\1" * n))
    path.write_bytes(file_of("<", packed(array("<", "X", 9, (32, 32, 3, n), 2, bytes(n * 3072))), y))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_images(local(path), "svhn")) == n
        assert tracemalloc.get_traced_memory()[1] < 16e6, "a buffer of 8 MB of the file among it"
        claims = array("<", "X", 9, (32, 32, 3, 2**31 - 1), 2, b"")
        path.write_bytes(file_of("<", packed(claims), y))
        refused(local(path), "counts 6,597,069,763,584 bytes, more than", "--max-ratio")
        path.write_bytes(file_of("<", claims, y))
        refused(local(path), "counts 6,597,069,763,584 bytes, more than")
        labels = packed(array("<", "y", 6, (2**31 - 1, 1), 9, b""))
        path.write_bytes(file_of("<", packed(claims), labels))
        refused(local(path, limits=Limits(ratio=10**12)), "array y", "holds 0 bytes of type 9")
        assert tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()


WHOLE = file_of("<", *parts("<", random_images(2)).values())
HEADS = [at for at in range(len(WHOLE)) if not 200 <= at < 6300]  # bytes that are no pixels


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(HEADS), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_damaged_headers_are_refused_or_read_and_never_crash(edits: list[tuple[int, int]], pack: bool) -> None:
    data = bytearray(WHOLE)
    for at, value in edits:
        data[at] = value
    if pack:
        data = bytearray(data[:128] + packed(bytes(data[128:])))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train_32x32.mat")
        path.write_bytes(data)
        try:
            assert len(read(local(path))) <= 2
        except FigmentError as error:
            assert "train_32x32.mat" in str(error) and "\n" not in str(error)


def test_the_web_is_a_source(tmp_path: Path) -> None:
    """Of a server that gives whole files alone, which cannot be jumped in."""
    folder = archives.svhn(tmp_path / "svhn", {"train": TRAIN, "test": TEST})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/train_32x32.mat"
        found = read(Source(*open_source(url), url))
        server.shutdown()
    assert rows(found, "train") == in_order(TRAIN) and rows(found, "test") == in_order(TEST)
