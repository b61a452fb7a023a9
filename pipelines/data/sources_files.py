"""Sources that hold image files: the ImageNet archives, and folders of classes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pyarrow import fs as pafs

from pipelines.data.sources_io import UNLABELLED, BadFile, EncodedImage, ImageFile, Images, Source, too_large
from pipelines.data.sources_tar import Member, member_names, read_whole, tar_members
from pipelines.errors import FigmentError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


# --- ImageNet (Russakovsky et al. 2015), ILSVRC2012 -------------------------------------------------------------------


def imagenet_train(source: Source) -> Images:
    """`ILSVRC2012_img_train.tar`: a tar of one tar of JPEGs a synset.

    A label is the place among the sorted WordNet ids, as in the validation set, in whatever order the archive has them:
    where one can jump in it, all ids are read first. Else they must stand sorted, as in the official archive.
    """
    synsets = [_synset(source, name) for name in member_names(source)]
    known = {synset: label for label, synset in enumerate(sorted(synsets))}
    seen: list[str] = []
    for outer in tar_members(source, source.open()):
        synset = _synset(source, outer.name)
        if synset in seen:
            source.refuse(f"is the second tar of class {synset}")
        if not synsets and seen and synset < seen[-1]:
            source.refuse(
                f"class {synset} stands after {seen[-1]}, and a label is the place among the sorted ids, which a stream"
                " cannot tell beforehand; pack it with tar --sort=name, or read an uncompressed local copy"
            )
        if synsets and synset not in known:
            source.refuse("was not there before: the archive has changed while it was read")
        label = known.get(synset, len(seen))
        seen.append(synset)
        for member in tar_members(source, outer.stream, inside=outer):
            yield _encoded(source, "train", member, label)
    return tuple(sorted(seen))


def _synset(source: Source, name: str) -> str:
    synset, dot, suffix = name.rpartition("/")[2].rpartition(".")
    if not dot or suffix != "tar":
        source.refuse(f"{name} is no tar of a class; in ILSVRC2012_img_train.tar every member is")
    return synset


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
