"""CIFAR-100 in both layouts (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html): 100 classes in 20 families.

The label of an image is its class (the "fine" one). The family (the "coarse" label) is its column `family`, a number
whose names stand in the manifest's source. It must be known, and the same for all images of a class.

The binary archive is read some hundred images at a time. The Python one has all training images in one pickle of
155 MB, which is held whole, and up to three times while it is read.
"""

from __future__ import annotations

import numpy as np

from pipelines.data.columns import Column
from pipelines.data.sources_arrays import (
    CIFAR_PIXELS,
    CIFAR_SHAPE,
    META_BYTES,
    batch_labels,
    batch_pixels,
    check_labels,
    cifar_records,
    pickled_names,
    unpickled,
)
from pipelines.data.sources_io import Images, RawImage, Source
from pipelines.data.sources_tar import read_whole, tar_members

CLASSES, FAMILIES = 100, 20
FAMILY = Column("family", ("family",), "uint8")
RECORD = 2 + CIFAR_PIXELS  # bytes: family, class, then the red, green and blue planes
PICKLE_BYTES = 200_000_000  # that a pickled split may have, whatever Limits say: 155 MB are the training images
PICKLE_OPCODES = 1_000_000  # three lists of 50,000, of which one holds names of files


def cifar100_binary(source: Source) -> Images:
    """`cifar-100-binary.tar.gz`: `train.bin` and `test.bin` of records of 2 labels and 3,072 pixel bytes."""
    names: dict[str, tuple[str, ...]] = {}
    families = _Families()
    source.columns = (FAMILY,)
    for member in tar_members(source, source.open()):
        kind, _, rest = member.base_name.partition("_")
        if kind in ("fine", "coarse") and rest == "label_names.txt":
            if member.size > META_BYTES:
                source.refuse(f"has {member.size:,} bytes, label names are expected")
            names[kind] = tuple(read_whole(source, member).decode("utf-8", "replace").split())
        elif member.base_name in ("train.bin", "test.bin"):
            split = member.base_name.removesuffix(".bin")
            for first, records in cifar_records(source, member, RECORD):
                families.check(source, records[:, 1], records[:, 0], first)
                of_records = records[:, :1].copy()  # a view would keep the whole piece of the archive
                for i, (record, coarse_label) in enumerate(zip(records, of_records, strict=True), first):
                    pixels, family = record[2:].reshape(CIFAR_SHAPE), {FAMILY.name: coarse_label}
                    yield RawImage(split, pixels, int(record[1]), f"{member.name}[{i}]", family)
    return _checked(source, names.get("fine", ()), names.get("coarse", ()), "{fine,coarse}_label_names.txt")


def cifar100_python(source: Source) -> Images:
    """`cifar-100-python.tar.gz`: pickled dicts of `data` uint8 (N, 3072), `fine_labels` and `coarse_labels`."""
    fine: tuple[str, ...] = ()
    coarse: tuple[str, ...] = ()
    families = _Families()
    source.columns = (FAMILY,)
    for member in tar_members(source, source.open()):
        if member.base_name == "meta":
            meta = unpickled(source, read_whole(source, member))
            fine = pickled_names(meta.get(b"fine_label_names"), CLASSES)
            coarse = pickled_names(meta.get(b"coarse_label_names"), FAMILIES)
        elif member.base_name in ("train", "test"):
            batch = unpickled(source, read_whole(source, member, PICKLE_BYTES), PICKLE_OPCODES)
            pixels = batch_pixels(source, batch)
            labels = batch_labels(source, batch, b"fine_labels", len(pixels), CLASSES)
            coarse_labels = batch_labels(source, batch, b"coarse_labels", len(pixels), FAMILIES)
            families.check(source, labels, coarse_labels)
            for i, (row, label) in enumerate(zip(pixels, labels, strict=True)):
                family, member_name = {FAMILY.name: coarse_labels[i : i + 1]}, f"{member.name}[{i}]"
                yield RawImage(member.base_name, row.reshape(CIFAR_SHAPE), int(label), member_name, family)
    return _checked(source, fine, coarse, "meta")


class _Families:
    """Which family each class was found to be of."""

    def __init__(self) -> None:
        self._of = np.full(CLASSES, -1)

    def check(self, source: Source, classes: np.ndarray, families: np.ndarray, first: int = 0) -> None:
        """Labels (n,) of images of which the first is number `first` of its member; refuses what cannot be."""
        stride = RECORD if classes.dtype == np.uint8 else 0
        check_labels(source, classes, CLASSES, first, stride)
        check_labels(source, families, FAMILIES, first, stride)
        for label in np.unique(classes).tolist():
            found = np.flatnonzero(classes == label)
            known = families[found[0]] if self._of[label] < 0 else self._of[label]
            other = found[families[found] != known]
            if len(other):
                place, given = first + int(other[0]), families[other[0]]
                source.refuse(f"record {place:,} gives class {label} the coarse label {given}, another one {known}")
            self._of[label] = known


def _checked(source: Source, fine: tuple[str, ...], coarse: tuple[str, ...], where: str) -> tuple[str, ...]:
    if (len(fine), len(coarse)) != (CLASSES, FAMILIES):
        source.refuse(
            f"has no {where} with {CLASSES} fine and {FAMILIES} coarse label names (it has {len(fine)} and"
            f" {len(coarse)}): this is not the whole official archive"
        )
    source.found["families"] = coarse
    return fine
