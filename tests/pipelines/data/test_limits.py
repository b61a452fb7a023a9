"""Small files that claim much: refused in one sentence, or counted as bad images, within a bounded memory.

Memory is measured by what the kernel gives: a process of its own may take a stated number of MB more than it has.
"""

from __future__ import annotations

import bz2
import gzip
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import sources_io
from pipelines.data.images import Bad, Row, prepare
from pipelines.data.sources import detect_format, read_images
from pipelines.data.sources_io import BadFile, EncodedImage, ImageFile, Limits
from pipelines.errors import FigmentError
from tests.pipelines.data import archives
from tests.pipelines.data.archives import local, picture, random_images, tar_bytes

ROOT = Path(__file__).parents[3]

FEW_MB_MORE = """
import re, resource, sys
from pathlib import Path
from pipelines.data.images import prepare
from pipelines.data.sources import read_images
from pipelines.data.sources_io import EncodedImage
from pipelines.errors import FigmentError
from tests.pipelines.data.archives import local

def say(path, form):
    try:
        print("images", sum(1 for _ in read_images(local(path), form)))
    except FigmentError as error:
        print(error)

megabytes, path, form = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
has = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (has + (megabytes << 20),) * 2)
if form == "image":
    print(prepare([EncodedImage("train", path.read_bytes(), 0, path.name)], 32, "raw")[0])
elif form == "bits":
    for bit in range(128):
        file = path / ("train-images-idx3-ubyte" + sys.argv[4])
        whole = file.read_bytes()
        data = bytearray(whole) if not sys.argv[4] else bytearray(__import__("gzip").decompress(whole))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data if not sys.argv[4] else __import__("gzip").compress(data, 1))
        say(path, "idx")
        file.write_bytes(whole)
else:
    say(path, form)
"""


def within(megabytes: int, path: Path, form: str, *more: str) -> list[str]:
    """What reading `path` says in a process that may take `megabytes` more than it has after its imports."""
    command = [sys.executable, "-c", FEW_MB_MORE, str(megabytes), str(path), form, *more]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout.splitlines()


def png(side: int) -> bytes:
    """One bit a pixel, all of them black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + -(-side // 8)) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# --- images -----------------------------------------------------------------------------------------------------------


def test_a_png_of_21_kb_that_would_take_a_gigabyte_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(13_300))
    assert path.stat().st_size < 30_000
    (said,) = within(100, path, "image")
    assert "Bad(" in said and "13,300 x 13,300 pixels" in said and "--max-megapixels 100" in said


def one(data: bytes, limits: Limits | None = None) -> Row | Bad:
    return prepare([EncodedImage("train", data, 0, "x")], 32, "raw", limits=limits)[0]


def test_pixels_and_their_proportion_to_the_file_are_limited() -> None:
    within_both = one(png(4_000))  # 48 MB of pixels: below what any file may make
    assert isinstance(within_both, Row)
    bomb = one(png(6_000))
    assert isinstance(bomb, Bad) and "6,000 x 6,000 pixels" in bomb.reason and "--max-ratio 200" in bomb.reason
    assert isinstance(one(png(6_000), Limits(ratio=10**6)), Row)
    photograph = picture(0, 400, 300)
    assert isinstance(one(photograph, Limits(pixels=120_000)), Row)
    bad = one(photograph, Limits(pixels=119_999))
    assert isinstance(bad, Bad) and "400 x 300" in bad.reason


def test_the_limits_let_in_the_largest_images_of_imagenet() -> None:
    """Some have tens of megapixels and 15 MB; a photograph has more than a tenth of a bit a pixel."""
    limits = Limits()
    assert limits.pixels >= 80e6 and limits.file_bytes >= 40e6  # a CIFAR pickle has 31 MB
    assert 24 / limits.ratio <= 0.15


def test_an_image_file_that_is_too_large_is_bad_and_the_next_is_read(tmp_path: Path) -> None:
    small, large = picture(0), picture(1) + bytes(50_000)
    limits = Limits(file_bytes=40_000)
    tar = archives.imagenet_train(tmp_path / "train.tar", {"n00000001": [small, large, small]})
    folder = archives.tree(tmp_path / "tree", {"a/1.jpg": small, "a/2.jpg": large, "a/3.jpg": small})
    for path, kind in ((tar, EncodedImage), (folder, ImageFile)):
        source = local(path, limits=limits)
        found = list(read_images(source, detect_format(source)))
        assert [type(image) for image in found] == [kind, BadFile, kind]
        (bad,) = prepare([found[1]], 32, "raw")
        assert isinstance(bad, Bad) and f"has {len(large):,} bytes" in bad.reason and "--max-file-mb" in bad.reason


# --- headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_header_with_any_bit_flipped_is_refused(tmp_path: Path, suffix: str) -> None:
    train, test = random_images(60, (1, 28, 28)), random_images(3, (1, 28, 28))
    folder = archives.idx(tmp_path / "mnist", train, test, compressed=bool(suffix))
    said = within(150, folder, "bits", suffix)
    assert len(said) == 128
    assert all("train-" in line and not line.startswith("images") for line in said), said
    assert not any("MemoryError" in line for line in said)


def test_the_pieces_of_an_idx_file_are_bounded(tmp_path: Path) -> None:
    train = random_images(40, (1, 600, 600))
    folder = archives.idx(tmp_path / "idx", train, random_images(2, (1, 600, 600)))
    found = list(read_images(local(folder), "idx"))
    assert sorted((i.pixels.tobytes(), i.label) for i in found[:40]) == train.rows()  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_members_are_refused(tmp_path: Path, how: str) -> None:
    """3 GiB in 10 KB, as GNU tar itself packs a file with a hole, in each of its four ways."""
    with (tmp_path / "ILSVRC2012_val_00000001.JPEG").open("wb") as file:
        file.truncate(3 << 30)
    form = ["--format=gnu"] if how == "gnu" else ["--format=posix", f"--sparse-version={how}"]
    path = tmp_path / "val.tar"
    subprocess.run(["tar", "-cS", *form, "-f", path, "ILSVRC2012_val_00000001.JPEG"], cwd=tmp_path, check=True)
    assert path.stat().st_size < 50_000
    (said,) = within(100, path, "imagenet-val")
    assert "val.tar" in said and "sparse" in said


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tarfile.TarInfo], Path]:
    """A gzipped tar of one entry of 120 MB, in less than 1 MB."""

    def make(info: tarfile.TarInfo) -> Path:
        path = tmp_path_factory.mktemp("zeros") / "cifar.tar.gz"
        info.size = 120_000_000
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            for _ in range(120):
                file.write(bytes(1_000_000))
            file.write(bytes(-info.size % 512 + 1024))
        return path

    return make


@pytest.mark.parametrize(
    ("name", "kind", "form", "reason"),
    [
        ("cifar-10-batches-py/data_batch_1", tarfile.REGTYPE, "cifar10-python", "--max-file-mb 64"),
        ("cifar-10-batches-bin/batches.meta.txt", tarfile.REGTYPE, "cifar10-binary", "120,000,000 bytes"),
        ("././@LongLink", tarfile.GNUTYPE_LONGNAME, "cifar10-binary", "a header that claims 120,000,000 bytes"),
        ("pax", tarfile.XHDTYPE, "cifar10-binary", "a header that claims 120,000,000 bytes"),
    ],
)
def test_members_and_headers_that_are_held_whole_are_limited(
    zeros: Callable[[tarfile.TarInfo], Path], name: str, kind: bytes, form: str, reason: str
) -> None:
    info = tarfile.TarInfo(name)
    info.type = kind
    (said,) = within(80, zeros(info), form)
    assert "cifar.tar.gz" in said and reason in said


def test_an_image_of_120_mb_in_a_small_archive_is_a_bad_image(zeros: Callable[[tarfile.TarInfo], Path]) -> None:
    assert within(80, zeros(tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")), "imagenet-val") == ["images 1"]


def test_a_compressed_file_may_not_unpack_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cifar.tar.bz2"
    path.write_bytes(bz2.compress(tar_bytes({"cifar-10-batches-bin/readme.html": bytes(30_000_000)})))
    with pytest.raises(FigmentError, match="not the whole official archive"):
        list(read_images(local(path), "cifar10-binary"))
    monkeypatch.setattr(sources_io, "UNPACKED_FLOOR", 10_000_000)
    with pytest.raises(FigmentError, match=r"cifar.tar.bz2.* bytes unpack to more than 200 times.*--max-ratio"):
        list(read_images(local(path), "cifar10-binary"))
    with pytest.raises(FigmentError, match="not the whole official archive"):
        list(read_images(local(path, limits=Limits(ratio=10**6)), "cifar10-binary"))


def test_headers_within_headers_are_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 16
    record = b"16 comment=abcd\n".ljust(512, b"\0")
    path = tmp_path / "deep.tar"
    path.write_bytes((header.tobuf(tarfile.USTAR_FORMAT) + record) * 3000)
    with pytest.raises(FigmentError, match=r"deep.tar.*no tar header at byte"):
        list(read_images(local(path), "cifar10-binary"))


def test_damaged_tar_headers_are_refused_and_never_crash(tmp_path: Path) -> None:
    """Bytes of headers changed at random, in tars of both formats with long names and extended records."""
    rng = np.random.default_rng(0)
    path = tmp_path / "val.tar"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=form) as tar:
            for i in range(3):
                info = tarfile.TarInfo(f"{'d' * 120}/ILSVRC2012_val_{i:08d}.JPEG")
                info.pax_headers = {"comment": "x" * 30, "mtime": "1.5", "size": "0"}
                tar.addfile(info)
        whole = path.read_bytes()
        for _ in range(400):
            data = bytearray(whole)
            for at in rng.integers(0, 5_000, rng.integers(1, 4)):
                data[at] = rng.choice([0, 0x30, 0x37, 0x39, 0x53, 0x78, 0xFF, 0x80, int(rng.integers(256))])
            for block in range(0, len(data) - 512, 512):  # a header is believed when its sum is right
                if data[block + 257 : block + 262] == b"ustar":
                    data[block + 148 : block + 156] = b" " * 8
                    data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
            path.write_bytes(data)
            try:
                list(read_images(local(path), "imagenet-val"))
            except FigmentError as error:
                assert "val.tar" in str(error)
