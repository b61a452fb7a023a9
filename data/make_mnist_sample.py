"""Makes the MNIST sample that the repository ships from the four official files.

    python data/make_mnist_sample.py MNIST_FOLDER data/mnist-sample

The sample keeps the official layout (four gzipped IDX files of the official names), so whatever reads MNIST reads the
sample. Of each class it takes images at even distances over the whole file, in the official order: the files are not
shuffled. The first and the second half of the test file come from two groups of writers, and the first half is the
easier one, so the first images of each class would be a kinder sample than MNIST is.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np

CLASSES = 10
TAKE = {"train": 1000, "t10k": 200}  # images of each class


def even(labels: np.ndarray, n: int) -> np.ndarray:
    """The places of n images of each class, at even distances among those of the class, in the order of the file."""
    chosen = []
    for label in range(CLASSES):
        places = np.flatnonzero(labels == label)
        if len(places) < n:
            sys.exit(f"error: {n} images of class {label} wanted, {len(places)} found")
        chosen.append(places[np.arange(n) * len(places) // n])
    return np.sort(np.concatenate(chosen))


def read(folder: Path, name: str, dimensions: int) -> np.ndarray:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        sys.exit(f"error: {folder} has no {name} and no {name}.gz")
    data = path.read_bytes()
    data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    magic, *sizes = struct.unpack_from(f">{1 + dimensions}I", data)
    if magic != 0x800 + dimensions:
        sys.exit(f"error: {path} is no IDX file of unsigned bytes in {dimensions} dimensions")
    return np.frombuffer(data, np.uint8, offset=4 * (1 + dimensions)).reshape(sizes)


def write(path: Path, values: np.ndarray) -> None:
    plain = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(plain, compresslevel=9, mtime=0))  # no name and no time: the same bytes every time
    sums = hashlib.sha256(path.read_bytes()).hexdigest(), hashlib.sha256(plain).hexdigest()
    print(f"{path.name}  {path.stat().st_size:,} bytes\n  sha256       {sums[0]}\n  of the IDX   {sums[1]}")


def main(source: Path, target: Path) -> None:
    sample = {}
    for stem, n in TAKE.items():
        images, labels = f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"
        pixels, digits = read(source, images, 3), read(source, labels, 1)
        if len(pixels) != len(digits):
            sys.exit(f"error: {images} has {len(pixels):,} images, {labels} {len(digits):,} labels")
        places = even(digits, n)
        sample |= {images: pixels[places], labels: digits[places]}
    target.mkdir(parents=True, exist_ok=True)
    for name, values in sample.items():
        write(target / f"{name}.gz", values)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python data/make_mnist_sample.py MNIST_FOLDER data/mnist-sample")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
