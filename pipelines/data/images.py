"""From an image as the source has it to the bytes that a shard stores: decode, resize, crop, encode.

Resizing makes the shorter side `size` pixels, then the centre square is cut out: bicubic with antialiasing (Pillow's
`BICUBIC` widens its support by the scale), the filter that evaluation of generative models settled on (Parmar et al.
2022, "On Aliased Resizing"). A JPEG of at least four times the size is first reduced by a power of two inside its DCT,
which keeps at least twice the wanted size and is several times as fast.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from pyarrow import fs as pafs

from pipelines.data.sources_io import EncodedImage, ImageFile, RawImage, SourceImage
from pipelines.errors import FigmentError

ENCODERS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 2},  # 6 takes 3.6 times as long at 256 pixels and saves 2 %
    "jpeg": {"quality": 95, "subsampling": 0},  # the only lossy one
    "webp": {"lossless": True, "exact": True, "method": 0, "quality": 0},  # the fastest; a quarter smaller than PNG
}
DEEPER_MODES = ("I", "F")  # 16 and 32 bits a channel; Pillow would clip them to 8


@dataclass(frozen=True)
class Row:
    """One image as a shard stores it."""

    image: bytes
    label: int
    sums: tuple[int, ...]  # of the pixel values of each channel, for the data set's mean


@dataclass(frozen=True)
class Bad:
    """One image that cannot be decoded."""

    member: str
    reason: str


class _BadImageError(Exception):
    """Why an image cannot be used."""


# What Pillow's decoders raise on damaged files: an OSError is the rule, the others leak from their parsers.
_DAMAGE = (
    _BadImageError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def stored_shape(image: SourceImage, size: int | None) -> tuple[int, int, int]:
    """(C, H, W) of what `prepare` makes of `image`. Without a `size` only raw pixels have a shape: their own."""
    if isinstance(image, RawImage):
        channels, height, width = image.pixels.shape
        return (channels, size or height, size or width)
    assert size is not None, "images in files have no shape before they are resized"
    return (3, size, size)


def prepare(
    images: Sequence[SourceImage], size: int | None, encoding: str, fs: pafs.FileSystem | None = None
) -> list[Row | Bad]:
    """One `Row` or `Bad` an image, in order. `size` None leaves raw pixels as they are; `fs` is where image files lie.

    Files are always made RGB: grey, palette, CMYK; transparency is dropped; the EXIF orientation is applied.
    """
    if size is None and encoding == "raw" and all(isinstance(image, RawImage) for image in images):
        return _as_they_are([image for image in images if isinstance(image, RawImage)])
    return [_prepare_one(image, size, encoding, fs) for image in images]


def _as_they_are(images: list[RawImage]) -> list[Row | Bad]:
    sums = np.stack([image.pixels for image in images]).sum(axis=(2, 3), dtype=np.int64).tolist()
    return [Row(image.pixels.tobytes(), image.label, tuple(s)) for image, s in zip(images, sums, strict=True)]


def _prepare_one(image: SourceImage, size: int | None, encoding: str, fs: pafs.FileSystem | None) -> Row | Bad:
    if isinstance(image, ImageFile):
        assert fs is not None, "the filesystem of the source is needed to read its files"
        try:
            with fs.open_input_stream(image.path, compression=None) as stream:
                data = bytes(stream.read())
        except OSError as error:  # no bad image: the source is gone, or may not be read
            raise FigmentError(f"{image.path} cannot be read: {' '.join(str(error).split())}") from error
        image = EncodedImage(image.split, data, image.label, image.member)
    try:
        picture = _from_pixels(image.pixels) if isinstance(image, RawImage) else _decoded(image.data, size)
        if size is not None and picture.size != (size, size):
            picture = _resized(picture, size)
        pixels = np.asarray(picture)
        planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        stored = planes.tobytes() if encoding == "raw" else _encode(picture, encoding)
    except _DAMAGE as error:
        return Bad(image.member, " ".join(str(error).split()) or type(error).__name__)
    return Row(stored, image.label, tuple(planes.sum(axis=(1, 2), dtype=np.int64).tolist()))


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if len(pixels) not in (1, 3):
        raise _BadImageError(f"{len(pixels)} channels; Figment resizes and encodes images of 1 or 3")
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _decoded(data: bytes, size: int | None) -> Image.Image:
    """An upright RGB image."""
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode.startswith(DEEPER_MODES):
            raise _BadImageError(f"mode {picture.mode} has more than 8 bits a channel: convert it first")
        if size is not None:
            picture.draft(None, (2 * size, 2 * size))  # acts on JPEG alone; never below twice the size
        upright = ImageOps.exif_transpose(picture)
        return upright.convert("RGB")


def _resized(picture: Image.Image, size: int) -> Image.Image:
    """The largest centre square, brought to size x size: shorter side = size and a centre crop, in one step."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _encode(picture: Image.Image, encoding: str) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, encoding.upper(), **ENCODERS[encoding])
    return sink.getvalue()
