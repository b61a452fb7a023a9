"""What an ingest is asked for, what that comes to for one source, and the key that says "the same ingest"."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Literal, get_args

import numpy as np
import PIL

from pipelines.data.images import stored_shape
from pipelines.data.packing import check_name
from pipelines.data.sources import detect_format, fingerprint, read_images
from pipelines.data.sources_io import Images, RawImage, Source, SourceImage
from pipelines.errors import FigmentError

Encoding = Literal["auto", "raw", "png", "jpeg", "webp"]
RAW_UP_TO = 64  # pixels a side; larger images are encoded: as WebP, the best lossless of `benchmarks.encodings`
DEFAULT_SIZE = 64  # pixels a side, for sources of image files
SIZES = range(8, 1025)
DEFAULT_CROP = {"celeba": 108}
"""Pixels a side of the centre square that a format's images are known by, where it is not the whole shorter side."""

SHARD_BYTES = 8 * 2**20
SHARD_ROWS = range(16, 4097)
HELD_BYTES = 600_000_000  # of stored images, that the driver holds in open shards and in those being written
WRITERS = 2  # shards being written at once; one more may wait for its turn
BYTES_A_VALUE = {"raw": 1.0, "png": 0.6, "jpeg": 0.2, "webp": 0.5}  # of photographs, for the number of rows a shard
REVISION = 4  # counts the changes to this pipeline that change the shards it makes
FORMAT_REVISIONS = {"cifar100-binary": 1, "cifar100-python": 1, "arrays": 1}
"""The same of one format alone: those that came to have columns. The keys of others stay what they were."""


@dataclass(frozen=True)
class IngestOptions:
    """What makes a difference to the shards, and so to the key under which a killed run is taken up again."""

    dataset_name: str
    format: str = "auto"
    size: int | None = None  # pixels a side; None: raw pixels keep theirs, image files get DEFAULT_SIZE
    crop: int | None = None  # pixels a side of the source, cut from its middle first; None: DEFAULT_CROP, or all
    encoding: Encoding = "auto"
    rows_per_shard: int | None = None
    on_bad_image: Literal["fail", "skip"] = "fail"
    mix_shards: int = 64  # open at the same time, unless HELD_BYTES allow fewer: more mix a sorted source better

    def __post_init__(self) -> None:
        check_name(self.dataset_name)
        if self.size is not None and self.size not in SIZES:
            raise FigmentError(f"size {self.size} is not in {SIZES[0]} … {SIZES[-1]} pixels")
        if self.crop is not None and self.crop < SIZES[0]:
            raise FigmentError(f"crop must be at least {SIZES[0]} pixels, not {self.crop}")
        if self.encoding not in get_args(Encoding):
            raise FigmentError(f"unknown encoding {self.encoding!r}; known: {', '.join(get_args(Encoding))}")
        if self.rows_per_shard is not None and self.rows_per_shard < 1:
            raise FigmentError(f"rows per shard must be at least 1, not {self.rows_per_shard}")
        if self.mix_shards < 1:
            raise FigmentError(f"mix shards must be at least 1, not {self.mix_shards}")


@dataclass(frozen=True)
class Layout:
    """What the options come to for one source."""

    format: str
    size: int | None
    encoding: str
    image_shape: tuple[int, int, int]
    rows_per_shard: int
    open_shards: int
    crop: int | None = None  # None: the centre square is as large as the shorter side

    @property
    def image_bytes(self) -> int:
        """The most that one stored image can take."""
        return most_bytes(self.image_shape, self.encoding)

    @property
    def held_bytes(self) -> int:
        """The most that the driver holds in open shards and in those on their way to storage."""
        return (self.open_shards + WRITERS + 1) * self.rows_per_shard * self.image_bytes


def most_bytes(shape: tuple[int, int, int], encoding: str) -> int:
    """No encoder makes more of an image, of noise even: PNG and WebP store what they cannot compress."""
    pixels = math.prod(shape)
    return pixels if encoding == "raw" else pixels + pixels // 50 + 4096


def shards_at_once(options: IngestOptions, rows: int, image_bytes: int) -> int:
    """How many shards are open at the same time: `mix_shards`, or as many as may be held."""
    if rows * image_bytes * (WRITERS + 2) > HELD_BYTES:
        raise FigmentError(
            f"{rows:,} images a shard of up to {image_bytes:,} bytes each are more than can be held;"
            f" --rows-per-shard can be {HELD_BYTES // image_bytes // (WRITERS + 2):,} at most"
        )
    return min(options.mix_shards, HELD_BYTES // (rows * image_bytes) - WRITERS - 1)


def plan_layout(source: Source, options: IngestOptions) -> tuple[Layout, Images]:
    """What the options come to, after a look at the first image; also all images, that one included."""
    with source.reading():
        name = detect_format(source) if options.format == "auto" else options.format
    images = read_images(source, name)
    try:
        first = next(images)
    except StopIteration as end:  # read_images raises when there is none
        raise AssertionError("read_images ended without an image and without an error") from end
    return layout_of(name, first, options), _with_first(first, images)


def layout_of(format_name: str, first: SourceImage, options: IngestOptions) -> Layout:
    """What the options come to for a source of this format whose first image is `first`."""
    crop = options.crop or DEFAULT_CROP.get(format_name)
    size = options.size
    if size is None:
        size = crop if isinstance(first, RawImage) else DEFAULT_SIZE
    if size is not None and size not in SIZES:
        raise FigmentError(f"a crop of {size:,} pixels is not stored as it is: say --size {SIZES[0]} … {SIZES[-1]}")
    shape = stored_shape(first, size)
    if crop is None and isinstance(first, RawImage) and first.pixels.shape == shape:
        size = None
    encoding: str = options.encoding
    if encoding == "auto":
        encoding = "raw" if max(shape[1:]) <= RAW_UP_TO else "webp"
    rows = options.rows_per_shard
    if rows is None:
        wanted = int(SHARD_BYTES / (np.prod(shape) * BYTES_A_VALUE[encoding]))
        rows = min(max(wanted, SHARD_ROWS[0]), SHARD_ROWS[-1])
    open_shards = shards_at_once(options, rows, most_bytes(shape, encoding))
    return Layout(format_name, size, encoding, shape, rows, open_shards, crop)


def _with_first(first: SourceImage, rest: Images) -> Images:
    yield first
    return (yield from rest)


def ingest_key(source: Source, options: IngestOptions, layout: Layout) -> str:
    """Names what goes in: the same key, the same shards."""
    files = source.identity
    if not files:
        with source.reading():
            files = fingerprint(source)
    settings = asdict(layout)
    if layout.crop is None:  # else the key is what it was before there were any
        del settings["crop"]
    body = {
        "revision": REVISION,
        "pillow": PIL.__version__,
        "torch": version("torch"),
        "source": source.name,
        "files": files,
        "limits": asdict(source.limits),
        "labels": hashlib.sha256("\n".join(source.labels or ()).encode()).hexdigest(),
        "dataset": options.dataset_name,
        "on_bad_image": options.on_bad_image,
        "mix_shards": options.mix_shards,
        "layout": settings,
    }
    if layout.format in FORMAT_REVISIONS:
        body["format_revision"] = FORMAT_REVISIONS[layout.format]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
