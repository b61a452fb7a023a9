"""Makes the CIFAR-10 sample that the repository ships from the official archive.

    python data/make_cifar_sample.py cifar-10-binary.tar.gz data/cifar-10-sample.tar.xz

The sample keeps the official binary layout (records of 1 label byte and 3,072 pixel bytes, in the official order), so
whatever reads CIFAR-10 reads the sample. It takes the first images of each class from the first training batch and from
the test batch: CIFAR-10's own order is shuffled, so the first ones are as good a choice as any, and no seed is needed.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np

RECORD = 1 + 3 * 32 * 32  # bytes: one label, then the red, green and blue planes
CLASSES = 10
FOLDER = "cifar-10-batches-bin"
TAKE = {"data_batch_1.bin": 4096, "test_batch.bin": 1024}

# Two delta filters turn each byte p into p(x, y) - p(x-1, y) - p(x, y-1) + p(x-1, y-1), the error of a planar
# prediction, before LZMA sees it: 10.5 MB where LZMA alone needs 11.9. (1 and 32 are the strides of x and y.)
FILTERS = [
    {"id": lzma.FILTER_DELTA, "dist": 1},
    {"id": lzma.FILTER_DELTA, "dist": 32},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0},
]


def balanced(records: np.ndarray, n: int) -> np.ndarray:
    """The first n // 10 records (one more for the first n % 10 classes) of each class, in the order they stand in."""
    keep = np.zeros(len(records), bool)
    for label in range(CLASSES):
        wanted = n // CLASSES + (label < n % CLASSES)
        rows = np.flatnonzero(records[:, 0] == label)
        if len(rows) < wanted:
            sys.exit(f"error: {wanted} images of class {label} wanted, {len(rows)} found")
        keep[rows[:wanted]] = True
    return records[keep]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(f"{FOLDER}/{name}")  # owner, mode and time stay at their fixed defaults
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def main(source: Path, target: Path) -> None:
    plain = io.BytesIO()
    with tarfile.open(source) as official, tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as sample:

        def read(name: str) -> bytes:
            member = official.extractfile(f"{FOLDER}/{name}")
            if member is None:
                sys.exit(f"error: {source} has no {FOLDER}/{name}")
            return member.read()

        add(sample, "batches.meta.txt", read("batches.meta.txt"))
        for name, n in TAKE.items():
            records = np.frombuffer(read(name), np.uint8).reshape(-1, RECORD)
            add(sample, name, balanced(records, n).tobytes())
    target.write_bytes(lzma.compress(plain.getvalue(), format=lzma.FORMAT_XZ, filters=FILTERS))
    print(f"{target}: {target.stat().st_size:,} bytes")
    print(f"sha256 of the file            {hashlib.sha256(target.read_bytes()).hexdigest()}")
    print(f"sha256 of the tar inside it   {hashlib.sha256(plain.getvalue()).hexdigest()}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python data/make_cifar_sample.py cifar-10-binary.tar.gz data/cifar-10-sample.tar.xz")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
