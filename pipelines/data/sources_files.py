"""Sources that hold image files: the ImageNet archives, and folders of classes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pyarrow import fs as pafs

from pipelines.data.sources_io import (
    UNLABELLED,
    BadFile,
    EncodedImage,
    ImageFile,
    Images,
    Member,
    Source,
    read_whole,
    tar_members,
    too_large,
)
from pipelines.errors import FigmentError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


# --- ImageNet (Russakovsky et al. 2015), ILSVRC2012 -------------------------------------------------------------------


def imagenet_train(source: Source) -> Images:
    """`ILSVRC2012_img_train.tar`: a tar of one tar of JPEGs a synset.

    Labels count the synsets in the order in which they stand in the archive (the official one has them sorted), so that
    the stream need not be read twice; label names are their WordNet ids.
    """
    synsets: dict[str, int] = {}
    for outer in tar_members(source, source.open()):
        synset, dot, suffix = outer.base_name.rpartition(".")
        if not dot or suffix != "tar":
            source.refuse("is no tar of a class; in ILSVRC2012_img_train.tar every member is")
        if synset in synsets:
            source.refuse(f"is the second tar of class {synset}")
        synsets[synset] = len(synsets)
        for member in tar_members(source, outer.stream, inside=outer):
            yield _encoded(source, "train", member, synsets[synset])
    return tuple(synsets)


def imagenet_val(source: Source) -> Images:
    """`ILSVRC2012_img_val.tar`: JPEGs whose number counts the lines of a ground-truth file; unlabelled without one.

    The lines are either WordNet ids (label = place among the sorted ids, as in the training set) or the numbers
    1 … 1000 of the development kit, which follow an order of their own: their label names are these numbers.
    """
    labels, names = _ground_truth(source)
    seen = 0
    for member in tar_members(source, source.open()):
        number = re.search(r"_(\d+)\.\w+$", member.base_name)
        if labels and (number is None or not 1 <= int(number[1]) <= len(labels)):
            source.refuse(f"{source.labels_name} has {len(labels):,} lines, none for this image")
        seen += 1
        yield _encoded(source, "val", member, labels[int(number[1]) - 1] if labels and number else UNLABELLED)
    if labels and seen != len(labels):
        source.refuse(f"has {seen:,} images, but {source.labels_name} has {len(labels):,} labels")
    return names


def _ground_truth(source: Source) -> tuple[list[int], tuple[str, ...]]:
    lines = source.labels
    if lines is None:
        return [], ()
    for i, line in enumerate(lines, 1):
        if not re.fullmatch(r"n\d{8}|[1-9]\d{0,3}", line):
            raise FigmentError(
                f"{source.labels_name}, line {i:,}: {line[:40]!r} is no WordNet id and no number 1 … 1000"
            )
    if not lines:
        raise FigmentError(f"{source.labels_name} has no labels")
    if all(line.isdigit() for line in lines):
        numbers = [int(line) for line in lines]
        if max(numbers) > 1000:
            where = next(i for i, number in enumerate(numbers, 1) if number > 1000)
            raise FigmentError(f"{source.labels_name}, line {where:,}: label {numbers[where - 1]} is not in 1 … 1000")
        return [number - 1 for number in numbers], tuple(str(i + 1) for i in range(max(numbers)))
    if any(line.isdigit() for line in lines):
        raise FigmentError(f"{source.labels_name} mixes WordNet ids and numbers")
    names = sorted(set(lines))
    index = {name: i for i, name in enumerate(names)}
    return [index[line] for line in lines], tuple(names)


def _encoded(source: Source, split: str, member: Member, label: int) -> EncodedImage | BadFile:
    where = f"{member.name} (byte {member.offset:,})"
    if member.size > source.limits.file_bytes:
        return BadFile(split, too_large(member.size, source.limits), label, where)
    return EncodedImage(split, read_whole(source, member), label, where)


# --- folders --------------------------------------------------------------------------------------------------------


def folders(source: Source) -> Images:
    """A tree `CLASS/….png` or `train/CLASS/….png`, `test/…`, `val/…`; classes are numbered by sorted name.

    A tree without class folders gives unlabelled images. Files that are no images by name are passed over.
    """
    top = source.files(source.path)
    inner = [info for info in top if info.type == pafs.FileType.Directory]
    if inner and all(info.base_name in SPLIT_FOLDERS for info in inner):
        trees = [(SPLIT_FOLDERS[info.base_name], info.path) for info in inner]
    else:
        trees = [("train", source.path)]
    listings = [(split, source.files(path)) for split, path in trees]
    classes = sorted({i.base_name for _, found in listings for i in found if i.type == pafs.FileType.Directory})
    for split, found in listings:
        for info in found:
            if info.type == pafs.FileType.Directory:
                tree = source.fs.get_file_info(pafs.FileSelector(info.path, recursive=True))
                label = classes.index(info.base_name)
                yield from _image_files(source, split, sorted(tree, key=lambda i: i.path), label)
            elif classes and info.base_name.lower().endswith(IMAGE_SUFFIXES):
                source.at = info.path.removeprefix(source.path).strip("/")
                source.refuse("lies beside folders of classes and has no class: move it into one")
        if not classes:
            yield from _image_files(source, split, found, UNLABELLED)
    return tuple(classes)


def _image_files(source: Source, split: str, found: list[pafs.FileInfo], label: int) -> Iterator[ImageFile | BadFile]:
    for info in found:
        if info.type == pafs.FileType.File and info.base_name.lower().endswith(IMAGE_SUFFIXES):
            member, size = info.path.removeprefix(source.path).strip("/"), info.size or 0
            if size > source.limits.file_bytes:
                yield BadFile(split, too_large(size, source.limits), label, member)
                continue
            source.bytes_read += size
            yield ImageFile(split, info.path, label, member)
