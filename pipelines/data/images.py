"""From an image as the source has it to the bytes that a shard stores: decode, resize, crop, encode.

The centre square (half a pixel off where it cannot lie in the middle) is made `size` pixels a side: bicubic with
antialiasing (the support of the filter is widened by the scale), the filter that evaluation of generative models
settled on (Parmar et al. 2022, "On Aliased Resizing"). Torch computes it, Pillow that of more than `BY_TORCH` pixels. A
JPEG of at least four times the size is first reduced by a power of two inside its DCT, to no less than `REDUCED` times
the wanted size. With a `crop` the square has so many pixels a side of the upright picture, whatever lies around it, and
nothing is reduced before; a picture with fewer is bad, for nothing is made up.

Every pixel becomes 8 bits of red, green and blue by the rules that Pillow documents: palettes are looked up, CMYK and
YCCK are converted without a profile, transparency is dropped and leaves the colour under it. One exception: grey of 16
bits becomes its upper 8, as 16-bit colours do in Pillow, which would clip such grey at 255 to nearly all white.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pickle import PickleBuffer
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from pyarrow import fs as pafs

from pipelines.data.columns import Values
from pipelines.data.sources_io import BadFile, EncodedImage, ImageFile, Limits, RawImage, SourceImage
from pipelines.errors import FigmentError

ENCODERS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 2},  # 6 takes 3.6 times as long at 256 pixels and saves 2 %
    "jpeg": {"quality": 95, "subsampling": 0},  # the only lossy one
    # Method 0 is the fastest; a quarter smaller than PNG, encoded 1.6 to 1.9 and decoded 1.2 to 1.6 times as fast.
    "webp": {"lossless": True, "exact": True, "method": 0, "quality": 0},
}
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may try on a file of a source. It can do more, but for EPS it would start Ghostscript on it."""

REDUCED = 2
"""A JPEG is decoded to at least so many times the wanted side.

At exactly so many times, the worst there is, the grey values (0 … 255) of 1,000 images of ImageNet differ from those of
the whole JPEG made smaller by 1.6 in the mean, and 99.9 % of them by 20 at most, where it is read at a half; by 2.6 and
31, where at a quarter. Another filter would change the mean as much, the extremes less. Once would be 4.7 and 62, four
times 0.9 and 11 (`python -m benchmarks.encodings ARCHIVE --sizes 20 40 --images 1000`).
"""

BY_TORCH = 4_000_000  # pixels of the largest picture that is copied for torch; Pillow needs no copy of larger ones
WHITE_IS_ZERO = 0  # Photometric interpretation of TIFF
TURNS = {  # EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
RATIO_FLOOR = 64_000_000  # bytes of decoded pixels that any file may make, however small it is


@dataclass(frozen=True)
class Row:
    """One image as a shard stores it."""

    image: bytes
    label: int
    sums: tuple[int, ...]  # of the pixel values of each channel, for the data set's mean
    columns: Values = field(default_factory=dict)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Its bytes leave a worker without a copy of them in between. They are copied where they arrive: a row that
        still lay in what the worker sent would keep all of that from being deleted."""
        return _row, (PickleBuffer(self.image), self.label, self.sums, self.columns)


def _row(image: bytes | memoryview, label: int, sums: tuple[int, ...], columns: Values) -> Row:
    return Row(bytes(image), label, sums, {name: np.array(values) for name, values in columns.items()})


@dataclass(frozen=True)
class Bad:
    """One image that cannot be decoded."""

    member: str
    reason: str


class BadImageError(Exception):
    """Why an image cannot be used."""


# What Pillow's decoders raise on damaged files: an OSError is the rule, the others leak from their parsers.
DAMAGE = (
    BadImageError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    AssertionError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def open_image(data: bytes | memoryview, formats: tuple[str, ...]) -> Image.Image:
    """Its header is read, its pixels are not yet. `BadImageError` when it is of none of these formats."""
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:  # its text has the address of the buffer, which is another one each time
        known = formats[0] if len(formats) == 1 else f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise BadImageError(f"it is no {known} file that can be read") from None


def stored_shape(image: SourceImage, size: int | None) -> tuple[int, int, int]:
    """(C, H, W) of what `prepare` makes of `image`. Without a `size` only raw pixels have a shape: their own."""
    if isinstance(image, RawImage):
        channels, height, width = image.pixels.shape
        return (channels, size or height, size or width)
    assert size is not None, "images in files have no shape before they are resized"
    return (3, size, size)


def prepare(
    images: Sequence[SourceImage],
    size: int | None,
    encoding: str,
    fs: pafs.FileSystem | None = None,
    limits: Limits | None = None,
    crop: int | None = None,
) -> list[Row | Bad]:
    """One `Row` or `Bad` an image, in order. `size` None leaves raw pixels as they are; `fs` is where image files lie;
    `crop` is the side of the centre square that is resized, None the shorter side, and comes with a `size`.

    Files are always made RGB, and the EXIF orientation is applied.
    """
    if size is None and encoding == "raw" and all(isinstance(image, RawImage) for image in images):
        return _as_they_are([image for image in images if isinstance(image, RawImage)])
    return [_prepare_one(image, size, encoding, fs, limits or Limits(), crop) for image in images]


def _as_they_are(images: list[RawImage]) -> list[Row | Bad]:
    sums = np.stack([image.pixels for image in images]).sum(axis=(2, 3), dtype=np.int64).tolist()
    return [
        Row(image.pixels.tobytes(), image.label, tuple(s), image.columns) for image, s in zip(images, sums, strict=True)
    ]


def _prepare_one(
    image: SourceImage,
    size: int | None,
    encoding: str,
    fs: pafs.FileSystem | None,
    limits: Limits,
    crop: int | None,
) -> Row | Bad:
    if isinstance(image, BadFile):
        return Bad(image.member, image.reason)
    if isinstance(image, ImageFile):
        assert fs is not None, "the filesystem of the source is needed to read its files"
        try:
            with fs.open_input_stream(image.path, compression=None) as stream:
                data = bytes(stream.read())
        except OSError as error:  # no bad image: the source is gone, or may not be read
            raise FigmentError(f"{image.path} cannot be read: {' '.join(str(error).split())}") from error
        image = EncodedImage(image.split, data, image.label, image.member, image.columns)
    try:
        planes = _planes(image, size, limits, crop)
        stored = planes.tobytes() if encoding == "raw" else _encode(_from_pixels(planes), encoding)
    except DAMAGE as error:
        return Bad(image.member, " ".join(str(error).split()) or type(error).__name__)
    wide = np.uint32 if planes[0].size < 2**24 else np.uint64  # 64 bits take up to 4 times as long
    sums = tuple(planes.reshape(len(planes), -1).sum(axis=1, dtype=wide).tolist())
    return Row(stored, image.label, sums, image.columns)


def _planes(image: RawImage | EncodedImage, size: int | None, limits: Limits, crop: int | None) -> np.ndarray:
    """(C, H, W) of what is stored."""
    if isinstance(image, RawImage):
        pixels = image.pixels
        if crop is not None:
            left, top, right, bottom = _centre(pixels.shape[2], pixels.shape[1], crop)
            pixels = pixels[:, top:bottom, left:right]
        if size is None or pixels.shape[1:] == (size, size):
            return pixels
        return _resized(_from_pixels(pixels), size)
    picture = _decoded(image.data, size if crop is None else None, limits)
    if crop is not None:
        picture = picture.crop(_centre(*picture.size, crop))
    if size is None or picture.size == (size, size):
        return np.asarray(picture).transpose(2, 0, 1)
    return _resized(picture, size)


def _centre(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the square in the middle."""
    if min(width, height) < side:
        raise BadImageError(f"its {width:,} x {height:,} pixels have no square of {side:,}, which --crop wants")
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if len(pixels) not in (1, 3):
        raise BadImageError(f"{len(pixels)} channels; Figment resizes and encodes images of 1 or 3")
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _decoded(data: bytes | memoryview, size: int | None, limits: Limits) -> Image.Image:
    """An upright RGB image, with a `size` perhaps reduced."""
    picture = open_image(data, FILE_FORMATS)
    _check_claim(picture.size, len(data), limits)
    if size is not None:
        picture.draft(None, (REDUCED * size, REDUCED * size))  # acts on JPEG alone
    if (turn := _turn(picture)) is not None:
        picture = picture.transpose(turn)
    if picture.mode.startswith(("I", "F")):
        picture = _upper_8_bits(picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What makes it upright. One whose EXIF data cannot be read is taken as it is: they are no part of the picture."""
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        return None


def _upper_8_bits(picture: Image.Image) -> Image.Image:
    """Of grey whose range is known; a TIFF of 12 bits is grey too, and white may be its 0."""
    if not (picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM")):
        raise BadImageError(f"mode {picture.mode} tells no values for black and white: convert it to 8 bits first")
    tags = picture.tag_v2 if isinstance(picture, TiffImagePlugin.TiffImageFile) else {}
    (bits,) = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
    grey = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    return Image.fromarray(255 - grey if inverted else grey)


def _check_claim(size: tuple[int, int], file_bytes: int, limits: Limits) -> None:
    """What a header says is checked before anything is decoded: a file of some KB can claim a gigabyte of pixels."""
    width, height = size
    pixels = width * height
    if pixels > limits.pixels:
        allowed = f"--max-megapixels {limits.pixels / 1e6:,.0f}"
        raise BadImageError(f"its {width:,} x {height:,} pixels are more than {allowed} allows")
    if 3 * pixels > max(RATIO_FLOOR, limits.ratio * file_bytes):
        raise BadImageError(
            f"its {file_bytes:,} bytes would become {width:,} x {height:,} pixels,"
            f" more than --max-ratio {limits.ratio:,} allows"
        )


def _resized(picture: Image.Image, size: int) -> np.ndarray:
    """(C, size, size) of the largest centre square; torch makes it in a third of the time that Pillow takes, or less.

    Both compute with integers, so that every processor gives the same; they differ from each other by 1 at most where
    an image becomes clearly smaller, by 2 at most elsewhere.
    """
    from torch import from_numpy  # importing it takes a second, and most of what imports this module resizes nothing
    from torch.nn.functional import interpolate

    width, height = picture.size
    side = min(width, height)
    left, top, right, bottom = _centre(width, height, side)
    if width * height > BY_TORCH:
        square = picture.crop((left, top, right, bottom))
        return _pixels(square.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)[
            : len(square.getbands())
        ]
    pixels = _pixels(picture)[top:bottom, left:right].copy()
    # With its four dimensions in this order torch takes the pixels as they lie.
    made = interpolate(from_numpy(pixels[None]).permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True)[0]
    return made[: len(picture.getbands())].numpy()


def _pixels(picture: Image.Image) -> np.ndarray:
    """(height, width, values a pixel), without a copy where it can be: red, green and blue then have a fourth value."""
    width, height = picture.size
    try:
        return np.frombuffer(pa.array(picture).buffers()[-1], np.uint8).reshape(height, width, -1)
    except ValueError:  # it lies in several pieces of memory: 16 MiB are one, unless PILLOW_BLOCK_SIZE says otherwise
        return np.asarray(picture).reshape(height, width, -1)


def _encode(picture: Image.Image, encoding: str) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, encoding.upper(), **ENCODERS[encoding])
    return sink.getvalue()
