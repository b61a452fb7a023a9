"""Official distributions in: one generator a format, each in the literal dict `FORMATS`.

A format reads its source once, from front to back, yields its images lazily and returns the label names, which some
formats know only at their end. To add one: write one such function, name it in `FORMATS`, and, when its archives can be
told from their contents, say how in `_MARKS`.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

from pyarrow import fs as pafs

from pipelines.data.columns import ColumnError, check_described, check_row
from pipelines.data.sources_arrays import cifar10_binary, cifar10_python, idx, idx_pairs
from pipelines.data.sources_celeba import celeba, celeba_files
from pipelines.data.sources_cifar100 import cifar100_binary, cifar100_python
from pipelines.data.sources_files import folders, imagenet_train, imagenet_val
from pipelines.data.sources_io import BadFile, Images, Source, SourceImage
from pipelines.data.sources_npz import arrays, npz_file
from pipelines.data.sources_svhn import svhn, svhn_files
from pipelines.data.sources_tar import tar_members
from pipelines.errors import FigmentError

FORMATS: dict[str, Callable[[Source], Images]] = {
    "cifar10-binary": cifar10_binary,
    "cifar10-python": cifar10_python,
    "cifar100-binary": cifar100_binary,
    "cifar100-python": cifar100_python,
    "idx": idx,
    "imagenet-train": imagenet_train,
    "imagenet-val": imagenet_val,
    "folders": folders,
    "arrays": arrays,
    "svhn": svhn,
    "celeba": celeba,
}

SPLITS_IN_TURN = ("arrays", "celeba", "idx", "imagenet-train", "imagenet-val", "folders", "svhn")
"""Formats that give one split after the other; the batches of CIFAR lie in its archives in any order."""

CITATIONS = {
    "cifar10-binary": 'A. Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images"',
    "cifar10-python": 'A. Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images"',
    "cifar100-binary": 'A. Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images"',
    "cifar100-python": 'A. Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images"',
    "celeba": 'Z. Liu, P. Luo, X. Wang, X. Tang (2015), "Deep Learning Face Attributes in the Wild"',
    "svhn": 'Y. Netzer et al. (2011), "Reading Digits in Natural Images with Unsupervised Feature Learning"',
    "imagenet-train": 'O. Russakovsky et al. (2015), "ImageNet Large Scale Visual Recognition Challenge"',
    "imagenet-val": 'O. Russakovsky et al. (2015), "ImageNet Large Scale Visual Recognition Challenge"',
}
"""For the manifest, where the format tells the data set."""

_MARKS = (
    (re.compile(r"(^|/)cifar-10-batches-bin/"), "cifar10-binary"),
    (re.compile(r"(^|/)cifar-10-batches-py/"), "cifar10-python"),
    (re.compile(r"(^|/)cifar-100-binary/"), "cifar100-binary"),
    (re.compile(r"(^|/)cifar-100-python/"), "cifar100-python"),
    (re.compile(r"(^|/)n\d{8}\.tar$"), "imagenet-train"),
    (re.compile(r"(^|/)ILSVRC2012_val_\d+\.JPEG$"), "imagenet-val"),
)
"""Names of the first members of a tar, and what they tell about it."""


def detect_format(source: Source) -> str:
    """The format that the contents of `source` show; `FigmentError` when there is nothing or it is unknown."""
    if idx_pairs(source):
        return "idx"
    if npz_file(source):
        return "arrays"
    if svhn_files(source):
        return "svhn"
    if celeba_files(source):
        return "celeba"
    kind = source.fs.get_file_info(source.path).type
    if kind == pafs.FileType.NotFound:
        source.refuse("there is no such file or folder")
    if kind == pafs.FileType.Directory:
        return "folders"
    look = replace(source)
    with look.reading(), look.open() as stream:
        names = [member.name for member in islice(tar_members(look, stream), 2)]
    for mark, name in _MARKS:
        if any(mark.search(found) for found in names):
            return name
    return source.refuse(
        f"its members ({', '.join(names) or 'none'}, …) are those of no known archive;"
        f" say --format {', '.join(FORMATS)}, or unpack it into one folder a class"
    )


def fingerprint(source: Source) -> str:
    """Changes when a file of `source` does: by names, sizes and times of modification, without reading them."""
    digest = hashlib.sha256()

    def note(found: list[pafs.FileInfo]) -> None:
        for info in sorted(found, key=lambda info: info.path):
            relative = info.path.removeprefix(source.path)
            digest.update(f"{relative} {info.type.name} {info.size} {info.mtime_ns}\n".encode())

    own = [path for pair in idx_pairs(source).values() for path in pair if path]
    own = own or [*svhn_files(source).values()] or [*celeba_files(source).values()]
    if own:
        note(source.fs.get_file_info(own))
        return digest.hexdigest()
    info = source.fs.get_file_info(source.path)
    if info.type != pafs.FileType.Directory:
        note([info])
        return digest.hexdigest()
    for top in source.files(source.path):  # one class at a time: a listing of everything can be large
        is_folder = top.type == pafs.FileType.Directory
        note(source.fs.get_file_info(pafs.FileSelector(top.path, recursive=True)) if is_folder else [top])
    return digest.hexdigest()


def read_images(source: Source, format_name: str) -> Images:
    """The images of `source`; whatever cannot be read becomes a `FigmentError` with file, member and byte."""
    if format_name not in FORMATS:
        near = difflib.get_close_matches(format_name, FORMATS, 1)
        raise FigmentError(
            f"unknown format {format_name!r}{f', did you mean {near[0]!r}?' if near else ';'}"
            f" known are {', '.join(FORMATS)}"
        )
    count = 0
    images = FORMATS[format_name](source)
    while True:
        with source.reading():
            try:
                image = next(images)
            except StopIteration as end:
                names: tuple[str, ...] = end.value
                break
        count += 1
        _check_columns(source, image, first=count == 1)
        yield image
    if not count:
        source.at = ""
        source.refuse(f"has no images that format {format_name!r} would see; is it the right archive?")
    return names


def _check_columns(source: Source, image: SourceImage, first: bool) -> None:
    try:
        if first:
            check_described(source.columns)
        if not isinstance(image, BadFile) and (source.columns or image.columns):
            check_row(source.columns, image.columns)
    except ColumnError as error:
        source.at = image.member
        source.refuse(str(error))
