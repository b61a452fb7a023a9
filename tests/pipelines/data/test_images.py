"""What a stored image is: which part of the picture, in which colours, in which bytes."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from pipelines.data.images import FILE_FORMATS, Bad, Row, open_image, prepare
from pipelines.data.ingest_options import most_bytes
from pipelines.data.sources_files import IMAGE_SUFFIXES
from pipelines.data.sources_io import EncodedImage, RawImage
from tests.pipelines.data.archives import picture
from tests.pipelines.data.prepared import pixels, saved, stored


@pytest.mark.parametrize(("width", "height"), [(64, 64), (120, 64), (64, 120), (33, 90), (20, 10)])
def test_the_centre_square_is_kept(width: int, height: int) -> None:
    side = min(width, height)
    canvas = np.full((height, width, 3), 255, np.uint8)  # white, the centre square grey
    top, left = (height - side) // 2, (width - side) // 2
    canvas[top : top + side, left : left + side] = 100
    got = pixels(saved(Image.fromarray(canvas), "PNG"))
    margin = 2 if side >= 32 else 7  # the filter reaches two source pixels over the edge
    inner = got[:, margin:-margin, margin:-margin]
    assert inner.min() >= 98 and inner.max() <= 102
    # Halves of different colours meet in the middle: nothing is shifted.
    canvas[:, width // 2 :] = 0
    middle = pixels(saved(Image.fromarray(canvas), "PNG"))
    assert (middle[:, 8:24, 8:12] > 80).all() and (middle[:, 8:24, 20:24] < 20).all()


def test_shrinking_averages_and_does_not_alias() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    got = pixels(saved(Image.fromarray(stripes), "PNG"))[:, 4:-4, 4:-4]
    assert np.abs(got - 127.5).max() < 8


@pytest.mark.parametrize(
    ("channels", "height", "width"),
    [(1, 28, 28), (3, 32, 32), (1, 90, 201), (3, 301, 200), (3, 2000, 2000), (3, 250, 16_000), (3, 2000, 2001)],
)
def test_resizing_is_the_bicubic_filter_of_pillow(channels: int, height: int, width: int) -> None:
    """The last of them is so large that Pillow resizes it."""
    noise = np.random.default_rng(0).integers(0, 256, (channels, height, width), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = noise[:, top : top + side, left : left + side]
    for size in (16, 65):
        (row,) = prepare([RawImage("train", noise, 0, "noise")], size, "raw")
        assert isinstance(row, Row)
        got = np.frombuffer(row.image, np.uint8).reshape(channels, size, size).astype(int)
        wanted = [np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC)) for plane in square]
        assert np.abs(got - wanted).max() <= (0 if width == 2001 else 1)
        assert row.sums == tuple(got.sum(axis=(1, 2)))


def test_images_travel_beside_what_is_pickled_and_rows_keep_nothing_of_it() -> None:
    for item in (EncodedImage("train", b"x" * 1000, 3, "a"), Row(b"x" * 1000, 3, (1, 2, 3))):
        beside: list[pickle.PickleBuffer] = []
        packed = pickle.dumps(item, 5, buffer_callback=beside.append)
        assert len(packed) < 1000 and len(beside) == 1
        memory = bytearray(beside[0])
        back = pickle.loads(packed, buffers=[memory])
        assert back == item == pickle.loads(pickle.dumps(item, 5))
        memory[:] = bytes(1000)
        assert (back == item) == isinstance(item, Row)


RESIZE = """
import hashlib, sys
from pathlib import Path
from pipelines.data.images import prepare
from pipelines.data.sources_io import EncodedImage
files = [EncodedImage("train", Path(path).read_bytes(), 0, path) for path in sys.argv[1:]]
print(hashlib.sha256(b"".join(row.image for row in prepare(files, 40, "raw"))).hexdigest())
"""


def test_every_processor_resizes_to_the_same_bytes(tmp_path: Path) -> None:
    """The shards' names depend on it. Torch has one code for processors with AVX2, and one for all others."""
    files = [tmp_path / str(k) for k in range(8)]
    for k, path in enumerate(files):
        path.write_bytes(picture(k, 150 + 31 * k, 201 - 13 * k, mode="L" if k == 5 else "RGB"))
    other = {"ATEN_CPU_CAPABILITY": "default", "PILLOW_BLOCK_SIZE": "16k"}  # and Pillow gives its memory in pieces
    said = subprocess.run(
        [sys.executable, "-c", RESIZE, *map(str, files)],
        cwd=Path(__file__).parents[3],
        env=os.environ | other,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    rows = prepare([EncodedImage("train", path.read_bytes(), 0, "") for path in files], 40, "raw")
    assert said.stdout.strip() == hashlib.sha256(b"".join(r.image for r in rows if isinstance(r, Row))).hexdigest()


def test_a_jpeg_is_reduced_to_no_less_than_twice_the_size() -> None:
    """Of noise every reduction leaves a trace."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    data = saved(Image.fromarray(noise).resize((256, 256)), "JPEG", quality=95)
    whole = pixels(saved(Image.open(io.BytesIO(data)), "PNG"), 65)
    assert (pixels(data, 65) == whole).all()  # a half of 256 is less than twice 65
    half, full = pixels(data, 64), pixels(saved(Image.open(io.BytesIO(data)), "PNG"), 64)
    assert 0 < np.abs(half - full).mean() < 8


def test_a_large_jpeg_is_the_same_picture_through_its_dct() -> None:
    data = picture(5, 624, 512)
    fast = pixels(data)
    exact = pixels(saved(Image.open(io.BytesIO(data)), "PNG"))  # no such short cut for PNG
    assert np.abs(fast - exact).mean() < 1.0


def test_the_camera_orientation_is_applied() -> None:
    canvas = np.zeros((64, 64, 3), np.uint8)
    canvas[:32] = 255  # white above, black below
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    got = pixels(saved(Image.fromarray(canvas), "JPEG", exif=exif))
    assert got[:, :12].max() < 30 and got[:, 20:].min() > 225


@pytest.mark.parametrize("encoding", ["png", "webp", "jpeg"])
def test_encoded_images_decode_to_the_raw_ones(encoding: str) -> None:
    raw, row = pixels(picture(2), 48), stored(picture(2), 48, encoding)
    assert isinstance(row, Row)
    decoded = np.asarray(Image.open(io.BytesIO(row.image))).transpose(2, 0, 1)
    assert Image.open(io.BytesIO(row.image)).format == encoding.upper()
    assert np.abs(decoded - raw).mean() <= (3 if encoding == "jpeg" else 0)
    assert row.sums == tuple(raw.sum(axis=(1, 2)))


@pytest.mark.parametrize("encoding", ["png", "webp", "jpeg"])
def test_what_is_stored_is_bounded_by_its_pixels(encoding: str) -> None:
    """Noise is the worst there is; a profile of the source, larger than the picture, is left behind."""
    for size in (8, 65, 300):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))
        for form, options in (
            ("PNG", {"icc_profile": np.random.default_rng(1).bytes(500_000)}),
            ("JPEG", {"comment": b"x" * 60_000}),
        ):
            row = stored(saved(noise, form, **options), size, encoding)
            assert isinstance(row, Row) and len(row.image) <= most_bytes((3, size, size), encoding)


def test_raw_pixels_stay_as_they_are_or_are_resized() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 28, 28), (3, 32, 32)):
        images = [RawImage("train", rng.integers(0, 256, shape, np.uint8), i, str(i)) for i in range(5)]
        rows = prepare(images, None, "raw")
        assert [row.image for row in rows if isinstance(row, Row)] == [image.pixels.tobytes() for image in images]
        assert [row.sums for row in rows if isinstance(row, Row)] == [tuple(i.pixels.sum(axis=(1, 2))) for i in images]
        flat = RawImage("train", np.full(shape, 77, np.uint8), 0, "flat")
        (resized,) = prepare([flat], 64, "raw")
        assert isinstance(resized, Row) and resized.image == bytes([77]) * (shape[0] * 64 * 64)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: b"",
        lambda d: d[: len(d) // 2],
        lambda d: d[:20],
        lambda d: b"not an image at all",
        lambda d: saved(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_what_cannot_be_decoded_is_bad_with_a_reason(damage: object, form: str) -> None:
    bad = stored(damage(picture(1, form=form)))  # type: ignore[operator]
    assert isinstance(bad, Bad)
    assert bad.member == "a/b.jpeg (byte 512)" and bad.reason and "\n" not in bad.reason


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_random_damage_never_raises() -> None:
    rng = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        whole = picture(1, form=form)
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(256)
            item = stored(bytes(data))
            assert isinstance(item, Row | Bad)


def test_the_reason_is_the_same_each_time() -> None:
    reasons = {bad.reason for bad in (stored(b"not an image") for _ in range(3)) if isinstance(bad, Bad)}
    assert reasons == {"it is no JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM file that can be read"}


def test_every_suffix_that_is_taken_for_an_image_has_its_format() -> None:
    extensions = Image.registered_extensions()
    assert {extensions[suffix] for suffix in IMAGE_SUFFIXES} == set(FILE_FORMATS)
    for form in FILE_FORMATS:
        assert open_image(picture(1, form=form), FILE_FORMATS).format == form


DECODE = """
import sys
from pathlib import Path
from pipelines.data.images import prepare
from pipelines.data.sources_io import EncodedImage
print(prepare([EncodedImage("train", Path(sys.argv[1]).read_bytes(), 0, "cat.jpg")], 32, "raw")[0])
"""


def test_no_program_is_started_for_an_eps_file_under_another_name(tmp_path: Path) -> None:
    """Pillow hands EPS to Ghostscript. Here a program of that name would leave its trace, and fail."""
    eps, trace, gs = tmp_path / "cat.jpg", tmp_path / "was-here", tmp_path / "bin" / "gs"
    eps.write_bytes(saved(Image.open(io.BytesIO(picture(1))), "EPS"))
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {trace}\nexit 1\n")
    gs.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(eps)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"PATH": f"{gs.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "Bad(member='cat.jpg', reason='it is no JPEG" in done.stdout
    assert not trace.exists()


@pytest.mark.parametrize(("side", "size"), [(257, 256), (260, 256), (28, 64), (8, 31), (37, 64)])
def test_hardly_smaller_or_larger_images_differ_by_two_at_most(side: int, size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, side, side), np.uint8)
    (row,) = prepare([RawImage("train", noise, 0, "noise")], size, "raw")
    assert isinstance(row, Row)
    wanted = np.asarray(Image.fromarray(noise[0]).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.frombuffer(row.image, np.uint8).reshape(size, size) - wanted).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    quarters = np.repeat(np.repeat(np.array([[10, 80], [160, 240]], np.uint8), 8, 0), 8, 1)
    data = saved(Image.fromarray(quarters).convert("RGB"), "PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).transpose(2, 0, 1)
    assert (pixels(data, 16) == upright).all()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_exif_data_that_cannot_be_read_are_no_damage(form: str) -> None:
    grey = Image.new("RGB", (16, 16), (90, 90, 90))
    assert np.abs(pixels(saved(grey, form, exif=b"Exif\0\0garbage!"), 16).astype(int) - 90).max() <= 1
    # Orientation 6, and a camera's name that is a number: to read it is no trouble, to write it again is.
    tags = struct.pack("<HHHII", 2, 0x112, 3, 1, 6) + struct.pack("<HHII", 0x10F, 3, 1, 7) + bytes(4)
    odd = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags
    assert pixels(saved(grey, form, exif=odd), 16).shape == (3, 16, 16)


def test_the_shorter_side_of_a_jpeg_is_reduced_to_no_less_than_twice_the_size() -> None:
    """A landscape: its width would allow a reduction that its height does not."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 512, 3), np.uint8)
    data = saved(Image.fromarray(noise), "JPEG", quality=95)
    assert (pixels(data, 64) == pixels(saved(Image.open(io.BytesIO(data)), "PNG"), 64)).all()
