"""SVHN, the cropped digits (Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers/): files of MATLAB 5.

    train_32x32.mat  test_32x32.mat  extra_32x32.mat     X uint8 (32, 32, 3, N), y (N, 1) of 1 … 10, where 10 is the 0

In X the images lie one after the other, so some hundred are held at a time, however long the file is. Their labels
stand behind X and are read first, for which the file is jumped in; they take one byte an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

import numpy as np
from pyarrow import fs as pafs

from pipelines.data.sources_io import UNPACKED_FLOOR, Images, RawImage, Source
from pipelines.data.sources_matlab import Array, Numbers, matlab_arrays, skip

SPLITS = ("train", "test", "extra")
SHAPE = (32, 32, 3)  # of one image: rows, columns, colours
IMAGE = 32 * 32 * 3  # bytes
IMAGES_AT_ONCE = 512
LABELS_AT_ONCE = 1 << 16


def svhn_files(source: Source) -> dict[str, str]:
    """split -> its file, of those that lie in the folder that `source` is, or beside the one that it is."""
    names = {split: f"{split}_32x32.mat" for split in SPLITS}
    parent, _, name = source.path.rpartition("/")
    folder = parent if name in names.values() else source.path.rstrip("/")
    paths = {split: f"{folder}/{n}" for split, n in names.items() if source.own is None or n in source.own}
    return {split: p for split, p in paths.items() if source.fs.get_file_info(p).type == pafs.FileType.File}


def svhn(source: Source) -> Images:
    """`source` is the folder, or one of its files (on the web folders cannot be listed)."""
    files = svhn_files(source)
    if not files:
        source.refuse("has no file {train,test,extra}_32x32.mat")
    for split, path in files.items():
        yield from _images(source, split, path)
    return tuple("0123456789")


def _images(source: Source, split: str, path: str) -> Iterator[RawImage]:
    base = path.rpartition("/")[2]
    source.at = base
    with source.fs.open_input_file(path) as file:
        arrays = matlab_arrays(source, file, source.fs.get_file_info(path).size)
        if not {"X", "y"} <= arrays.keys():
            source.refuse(f"has the arrays {', '.join(sorted(arrays)[:10]) or 'none'}, SVHN has X and y")
        x, y = arrays["X"], arrays["y"]
        count = _checked_count(source, base, x, y)
        labels = _labels(source, file, base, y)
    with source.open(path) as stream:
        source.at = f"{base}, array X"
        skip(source, stream, x)
        numbers = Numbers(source, stream, x)
        if numbers.dtype != np.uint8:
            source.refuse(f"its pixels are stored as {numbers.dtype}, uint8 is expected")
        for first in range(0, count, IMAGES_AT_ONCE):
            n = min(IMAGES_AT_ONCE, count - first)
            columns = numbers.read(n * IMAGE).reshape(n, 3, 32, 32)  # of each colour one column after the other
            for i, image in enumerate(np.ascontiguousarray(columns.swapaxes(2, 3)), first):
                yield RawImage(split, image, int(labels[i]), f"{base}[{i}]")
        numbers.end()


def _checked_count(source: Source, base: str, x: Array, y: Array) -> int:
    """N, after both headers fit each other and what the file can hold."""
    source.at = f"{base}, array X"
    if x.dtype != np.uint8 or x.shape[:3] != SHAPE or len(x.shape) != 4 or not x.count:
        source.refuse(f"is {x.what}, images are uint8 (32, 32, 3, N)")
    room = max(UNPACKED_FLOOR, source.limits.ratio * x.size) if x.packed else x.size
    if x.count > room:
        source.refuse(
            f"its header counts {x.count:,} bytes, more than {x.size:,} bytes of the file may unpack to; if they are"
            " meant to, raise --max-ratio"
        )
    source.at = f"{base}, array y"
    if y.dtype is None or y.count != x.shape[3] or len(y.shape) != 2:
        source.refuse(f"is {y.what}, the labels of {x.shape[3]:,} images are numbers ({x.shape[3]}, 1)")
    return x.shape[3]


def _labels(source: Source, file: IO[bytes], base: str, y: Array) -> np.ndarray:
    """uint8 (N,): 0 … 9."""
    file.seek(y.at + 8)
    numbers, labels = Numbers(source, file, y), np.empty(0, np.uint8)
    for first in range(0, y.count, LABELS_AT_ONCE):
        values = numbers.read(min(LABELS_AT_ONCE, y.count - first))
        wrong = np.flatnonzero(~np.isin(values, np.arange(1, 11)))
        if len(wrong):
            source.refuse(f"item {first + int(wrong[0]):,} is {values[wrong[0]]}, labels are 1 … 10, where 10 is the 0")
        labels = np.concatenate([labels, values.astype(np.uint8) % 10])
    numbers.end()
    return labels
