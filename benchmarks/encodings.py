"""What stored images cost, and what reading large JPEGs at a reduced size changes: `python -m benchmarks.encodings`.

Takes an archive of ImageNet's layout and makes its images `--sizes` pixels as an ingest does. For each size, with one
core and on the same images, repetitions in turn:

- `encodings`: bytes an image, images/s of encoding and of decoding (to a NumPy array, as the training stream decodes).
  All but `jpeg-95` give the pixels back exactly. `raw` is there to compare with.
- `reduced`: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, to at least so many times the wanted side. Against
  the whole JPEG decoded and then made smaller: the mean absolute difference in grey values (0 … 255), the value that
  99.9 % of the pixels stay within, the largest; images/s of decoding and making smaller; how many images the reduction
  concerns at all.

Times are those that the process computed, not those on the wall.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from infra.storage import StorageError, open_source
from pipelines.data.sources import read_images
from pipelines.data.sources_io import EncodedImage, Source
from pipelines.errors import FigmentError

CANDIDATES: dict[str, dict[str, Any]] = {
    **{f"png-{level}": {"format": "PNG", "compress_level": level} for level in (1, 2, 3, 6)},
    "png-rle": {"format": "PNG", "compress_level": 1, "compress_type": 3},
    **{
        f"webp-{method}-{quality}": {
            "format": "WEBP",
            "lossless": True,
            "exact": True,
            "method": method,
            "quality": quality,
        }
        for method, quality in ((0, 0), (0, 25), (0, 75), (1, 0), (2, 0), (3, 0), (4, 0))
    },
    "jpeg-95": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Settings:
    """Measure how images can be stored, and how large JPEGs can be read."""

    archive: Annotated[str, tyro.conf.Positional]
    """ILSVRC2012_img_train.tar, or part of it in the same layout."""
    sizes: tuple[int, ...] = (128, 256)
    images: int = 300
    """Of the archive, the first so many."""
    repetitions: int = 3
    side: int | None = None
    """Shorter side in pixels that the images are brought to first, as JPEG again. Default: they stay as they are."""


def resized(data: bytes, size: int, factor: float | None) -> Image.Image:
    """Centre square, made smaller; `factor` None decodes all of the JPEG."""
    picture = Image.open(io.BytesIO(data))
    if factor is not None:
        picture.draft(None, (round(factor * size), round(factor * size)))
    rgb = picture.convert("RGB")
    width, height = rgb.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def encoded(picture: Image.Image, options: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, **options)
    return sink.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def _timed(run: Callable[[Any], Any], items: Sequence[Any]) -> tuple[list[Any], float]:
    """(results, items a second)."""
    began = time.process_time()
    results = [run(item) for item in items]
    return results, len(items) / (time.process_time() - began)


def measure_encodings(files: list[bytes], size: int, repetitions: int) -> dict[str, Any]:
    pictures = [resized(data, size, None) for data in files]
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in CANDIDATES}
    for _ in range(repetitions):
        for name, options in CANDIDATES.items():
            stored, encode = _timed(partial(encoded, options=options), pictures)
            pixels, decode = _timed(decoded, stored)
            exact = all(np.array_equal(a, np.asarray(b)) for a, b in zip(pixels, pictures, strict=True))
            assert exact == (options["format"] != "JPEG"), name
            found[name]["bytes"].append(sum(map(len, stored)) / len(stored))
            found[name]["encode"].append(encode)
            found[name]["decode"].append(decode)
    table = {name: {what: round(statistics.median(v)) for what, v in values.items()} for name, values in found.items()}
    return {"raw": {"bytes": 3 * size * size}} | table


def measure_reduced(files: list[bytes], size: int, repetitions: int) -> dict[str, Any]:
    speeds: dict[str, list[float]] = defaultdict(list)
    table: dict[str, Any] = {}
    whole = np.array([np.asarray(resized(data, size, None)) for data in files]).astype(np.int16)
    for factor in FACTORS:
        made = np.array([np.asarray(resized(data, size, factor)) for data in files])
        difference = np.abs(made - whole)
        table[str(factor)] = {
            "mean": round(float(difference.mean()), 3),
            "p99.9": float(np.percentile(difference, 99.9)),
            "max": int(difference.max()),
            "images_reduced": int(difference.any(axis=(1, 2, 3)).sum()),
        }
    for _ in range(repetitions):
        for key in (None, *FACTORS):
            speeds[str(key)].append(_timed(partial(resized, size=size, factor=key), files)[1])
    for name in table:
        table[name]["images_per_s"] = round(statistics.median(speeds[name]))
    return {"whole": {"images_per_s": round(statistics.median(speeds["None"]))}} | table


def load(settings: Settings) -> list[bytes]:
    source = Source(*open_source(settings.archive), name=settings.archive)
    images = (bytes(i.data) for i in read_images(source, "imagenet-train") if isinstance(i, EncodedImage))
    files = list(islice(images, settings.images))
    return files if settings.side is None else [jpeg_of_side(data, settings.side) for data in files]


def jpeg_of_side(data: bytes, side: int) -> bytes:
    """The same picture as another JPEG, its shorter side `side` pixels."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    return encoded(picture.resize((width, height), Image.Resampling.BICUBIC), {"format": "JPEG", "quality": 90})


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks.encodings")
    files = load(settings)
    result: dict[str, Any] = {}
    for size in settings.sizes:
        result[str(size)] = {
            "encodings": measure_encodings(files, size, settings.repetitions),
            "reduced": measure_reduced(files, size, settings.repetitions),
        }
        for part, table in result[str(size)].items():
            for name, row in table.items():
                print(f"  {size} {part:9} {name:9} " + "  ".join(f"{k} {v:,}" for k, v in row.items()), flush=True)
    print(json.dumps({"benchmark": "encodings", "images": len(files), "side": settings.side, "sizes": result}))


if __name__ == "__main__":
    try:
        main()
    except (FigmentError, StorageError) as error:
        sys.exit(f"error: {error}")
