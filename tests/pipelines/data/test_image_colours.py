"""What colours a stored image has: every mode of a file becomes 8-bit RGB, by rules that are said."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipelines.data.images import Bad, Row, prepare
from pipelines.data.sources_io import RawImage
from tests.pipelines.data.archives import picture
from tests.pipelines.data.prepared import pixels, saved, stored


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("1", "PNG"),
        ("P", "GIF"),
    ],
)
def test_every_colour_mode_becomes_rgb(mode: str, form: str) -> None:
    data = picture(1, mode=mode, form=form)
    wanted = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(wanted.size)
    box = ((wanted.width - side) // 2, (wanted.height - side) // 2)
    wanted = wanted.crop((*box, box[0] + side, box[1] + side)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(pixels(data) - np.asarray(wanted).transpose(2, 0, 1)).mean() < 2


def colours(data: bytes) -> set[tuple[int, ...]]:
    """The colours of the stored image, which has as many as few pixels of one colour each."""
    return {tuple(map(int, colour)) for colour in pixels(data, 8).reshape(3, -1).T}


def plain(colour: object, mode: str) -> Image.Image:
    return Image.new(mode, (8, 8), colour)  # type: ignore[arg-type]


def tiff(bits: int, photometric: int, rows: bytes) -> bytes:
    """An uncompressed TIFF of 8 x 8 grey pixels."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: 8, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(200, b"\0") + rows


def grey16(value: int, order: str = "<") -> Image.Image:
    mode = "I;16" if order == "<" else "I;16B"
    return Image.frombytes(mode, (8, 8), np.full((8, 8), value, f"{order}u2").tobytes())


@pytest.mark.parametrize(
    ("value", "grey"), [(0, 0), (255, 0), (256, 1), (0x7FFF, 127), (0x8000, 128), (0xFF00, 255), (0xFFFF, 255)]
)
def test_grey_of_16_bits_becomes_its_upper_8(value: int, grey: int) -> None:
    wanted = {(grey,) * 3}
    assert colours(saved(grey16(value), "PNG")) == wanted
    assert colours(saved(grey16(value), "TIFF")) == wanted
    assert colours(saved(grey16(value, ">"), "TIFF")) == wanted
    assert colours(saved(grey16(value), "PPM")) == wanted
    pair = struct.pack("<H", value)
    assert colours(tiff(16, 1, pair * 64)) == wanted
    assert colours(tiff(16, 0, pair * 64)) == {(255 - grey,) * 3}  # there 0 is white
    scaled = value >> 4  # a TIFF packs two pixels of 12 bits in three bytes
    twice = bytes([scaled >> 4, (scaled & 15) << 4 | scaled >> 8, scaled & 255])
    assert colours(tiff(12, 1, twice * 32)) == wanted


def test_grey_of_16_bits_is_turned_upright_too() -> None:
    levels = np.zeros((8, 8), np.uint16)
    levels[:4] = 0xC0FF  # above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    got = pixels(saved(Image.fromarray(levels), "PNG", exif=exif), 8)
    assert (got[:, :4] == 0).all() and (got[:, 4:] == 0xC0).all()


@pytest.mark.parametrize(("mode", "value"), [("I", 70_000), ("F", 0.5)])
def test_modes_whose_black_and_white_nobody_knows_are_refused(mode: str, value: float) -> None:
    bad = stored(saved(plain(value, mode), "TIFF"))
    assert isinstance(bad, Bad)
    assert bad.reason == f"mode {mode} tells no values for black and white: convert it to 8 bits first"


def test_colours_of_every_mode_by_hand() -> None:
    palette = plain(1, "P")
    palette.putpalette([1, 2, 3, 200, 100, 50])
    assert colours(saved(palette, "PNG")) == colours(saved(palette, "GIF")) == {(200, 100, 50)}
    assert colours(saved(palette, "PNG", transparency=1)) == {(200, 100, 50)}  # the colour under what cannot be seen
    assert colours(saved(plain((10, 20, 30, 0), "RGBA"), "PNG")) == {(10, 20, 30)}
    assert colours(saved(plain((10, 20, 30, 0), "RGBA"), "WEBP", lossless=True, exact=True)) == {(10, 20, 30)}
    assert colours(saved(plain((77, 128), "LA"), "PNG")) == {(77, 77, 77)}
    assert colours(saved(plain(1, "1"), "PNG")) == {(255, 255, 255)}
    assert colours(saved(plain(0, "1"), "TIFF")) == {(0, 0, 0)}


def test_jpegs_for_print() -> None:
    """Ink and black, c and k of 255: red = (255 - c)(255 - k) / 255, and so on."""
    for ink, wanted in (((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 200), (55,) * 3)):
        data = saved(plain(ink, "CMYK"), "JPEG", quality=100)
        (got,) = colours(data)
        assert np.abs(np.subtract(got, wanted)).max() <= 2
    # The same file says in its Adobe segment that its first three channels are Y, Cb and Cr of what is not ink:
    # 255 - ink = (76, 85, 255) is red there, and its last channel, 255 - 0, is no black.
    data = saved(plain((255 - 76, 255 - 85, 0, 0), "CMYK"), "JPEG", quality=100)
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0
    (got,) = colours(data[: adobe + 11] + b"\2" + data[adobe + 12 :])
    assert np.abs(np.subtract(got, (1, 255, 255))).max() <= 2


def test_grey_images_keep_their_values_in_every_lossless_encoding() -> None:
    ramp = RawImage("train", np.arange(128 * 128, dtype=np.uint8).reshape(1, 128, 128), 0, "ramp")
    for encoding in ("png", "webp"):
        (row,) = prepare([ramp], None, encoding)
        assert isinstance(row, Row)
        back = np.asarray(Image.open(io.BytesIO(row.image)).convert("L"))
        assert (back == ramp.pixels[0]).all() and row.sums == (int(ramp.pixels.sum()),)
