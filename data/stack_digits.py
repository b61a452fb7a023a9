"""Makes Stacked MNIST: images of three random digits, one a colour channel, which have a thousand modes.

    python data/stack_digits.py MNIST_FOLDER FOLDER      # writes FOLDER/stacked-mnist.npz, which `jobs.ingest` reads

Metz, Poole, Pfau, Sohl-Dickstein, "Unrolled Generative Adversarial Networks", 2016 (arXiv 1611.02163), §3.3.1. How many
of the modes a generator makes is counted with a classifier of single digits (models/metrics/modes.py).

MNIST_FOLDER holds the official IDX files, gzipped or not, or the sample that the repository ships (data/mnist-sample).
Every digit is drawn from all images of the split alike, independently of the others, so training images are made of
training digits alone. Label and name of digits a, b, c in red, green, blue are 100a + 10b + c and "abc"; the column
`digits` has the three.

The same files and seed give the same images everywhere, and fewer images are the first ones of more. In memory are the
digits (55 MB of the official ones), the places that were drawn, and some hundred images.

Shape legend: N images, M digits of a split, S side in pixels.
"""

from __future__ import annotations

import argparse
import json
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from make_mnist_sample import read
from numpy.lib import format as npy

Array = np.ndarray[Any, np.dtype[Any]]

STEMS = {"train": "train", "test": "t10k"}  # split -> how its IDX files begin
MODES = 1000
SIDE = 28  # of a digit, in pixels
AT_ONCE = 512  # images
SAY_EVERY_S = 5.0


def draw(n: int, seed: int, split: str, digits: int) -> Array:
    """Places of red, green and blue among the M digits of a split, int64 (N, 3)."""
    rng = np.random.default_rng([seed, *split.encode()])
    return (rng.random((n, 3)) * digits).astype(np.int64)


def stacked(pixels: Array, places: Array, size: int) -> Array:
    """Digits uint8 (M, 28, 28), places (N, 3) -> uint8 (N, 3, S, S), black around them."""
    border = (size - SIDE) // 2
    return np.pad(pixels[places], ((0, 0), (0, 0), (border, border), (border, border)))


def pieces(pixels: Array, places: Array, size: int, split: str) -> Iterator[Array]:
    """Some hundred images at a time; says how far it is."""
    began = said = time.monotonic()
    for first in range(0, len(places), AT_ONCE):
        yield stacked(pixels, places[first : first + AT_ONCE], size)
        done, now = min(first + AT_ONCE, len(places)), time.monotonic()
        if now - said >= SAY_EVERY_S or done == len(places):
            said = now
            print(f"{split}: {done:,} of {len(places):,} images, {done / (now - began):,.0f} a second", flush=True)


def write(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: type, parts: Iterator[Array]) -> None:
    """One array, a part at a time."""
    member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))  # no time: the same bytes every time
    member.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(member, "w", force_zip64=True) as file:
        descr = npy.dtype_to_descr(np.dtype(dtype))
        npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).data)


def read_split(folder: Path, split: str) -> tuple[Array, Array]:
    """Pixels uint8 (M, 28, 28) and labels uint8 (M,); ends with a sentence where they are not whole."""
    images, labels = f"{STEMS[split]}-images-idx3-ubyte", f"{STEMS[split]}-labels-idx1-ubyte"
    try:
        pixels, digits = read(folder, images, 3), read(folder, labels, 1)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise SystemExit(f"error: {folder}: {images} or {labels} cannot be read, fetch them again ({error})") from error
    if len(pixels) != len(digits) or not len(pixels):
        raise SystemExit(f"error: {folder}: {images} has {len(pixels):,} images, {labels} {len(digits):,} labels")
    if digits.max() > 9 or pixels.shape[1:] != (SIDE, SIDE):
        raise SystemExit(
            f"error: {folder}: digits 0 … 9 of {SIDE} x {SIDE} pixels are stacked, not labels up to {digits.max()} of"
            f" {' x '.join(map(str, pixels.shape[1:]))}"
        )
    return pixels, digits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mnist", type=Path, metavar="MNIST_FOLDER", help="where the four IDX files of MNIST are")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where stacked-mnist.npz is written")
    parser.add_argument("--size", type=int, choices=(28, 32), default=28, help="side of the images in pixels")
    parser.add_argument("--train", type=int, default=128_000, help="images to train with")
    parser.add_argument("--test", type=int, default=26_000, help="images of the digits of the test split")
    parser.add_argument("--seed", type=int, default=0, help="of which digits there are in an image")
    given = parser.parse_args()
    if min(given.train, given.test) < 1 or given.seed < 0:
        parser.error("--train and --test are 1 or more, --seed is 0 or more")
    splits = {split: read_split(given.mnist, split) for split in STEMS}
    given.folder.mkdir(parents=True, exist_ok=True)
    target, unfinished = given.folder / "stacked-mnist.npz", given.folder / ".stacked-mnist.npz.unfinished"
    names = [f"{mode:03}" for mode in range(MODES)]
    about = json.dumps({"labels": names, "columns": {"digits": ["red", "green", "blue"]}}).encode()
    with zipfile.ZipFile(unfinished, "w") as archive:
        for split, n in (("train", given.train), ("test", given.test)):
            pixels, labels = splits[split]
            places = draw(n, given.seed, split, len(pixels))
            digits = labels[places]
            shape = (n, 3, given.size, given.size)
            write(archive, f"{split}/images", shape, np.uint8, pieces(pixels, places, given.size, split))
            write(archive, f"{split}/labels", (n,), np.int64, iter([digits @ np.array([100, 10, 1])]))
            write(archive, f"{split}/digits", (n, 3), np.uint8, iter([digits]))
        write(archive, "about.json", (len(about),), np.uint8, iter([np.frombuffer(about, np.uint8)]))
    unfinished.replace(target)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
