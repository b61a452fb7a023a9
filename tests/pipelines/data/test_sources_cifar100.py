"""CIFAR-100 in both layouts, and what is wrong with one that is not the official archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import sources_cifar100
from pipelines.data.pickles import OPCODES, PickleError, unpickle
from pipelines.data.sources import detect_format, read_images
from pipelines.data.sources_io import Limits, RawImage, Source
from pipelines.errors import FigmentError
from tests.pipelines.data import archives
from tests.pipelines.data.archives import Images, local, random_images, tar_bytes

TRAIN, TEST = random_images(230, classes=100, seed=1), random_images(110, classes=100, seed=2)


def refused(source: Source, *parts: str) -> None:
    with pytest.raises(FigmentError) as error:
        list(read_images(source, detect_format(source)))
    message = str(error.value)
    for part in (source.name, *parts):
        assert part in message, message
    assert "\n" not in message


@pytest.mark.parametrize("make", [archives.cifar100_binary, archives.cifar100_python])
def test_both_layouts_give_the_fine_labels(tmp_path: Path, make: Callable[..., Path]) -> None:
    source = local(make(tmp_path / "any-name", TRAIN, TEST))
    images, found = read_images(source, detect_format(source)), []
    with pytest.raises(StopIteration) as end:
        while True:
            found.append(next(images))
    assert end.value.value == archives.FINE_NAMES
    for split, wanted in (("train", TRAIN), ("test", TEST)):
        got = [(i.pixels.tobytes(), i.label) for i in found if isinstance(i, RawImage) and i.split == split]
        assert sorted(got) == wanted.rows()
    assert isinstance(found[0], RawImage) and found[0].pixels.shape == (3, 32, 32)
    assert source.columns == (sources_cifar100.FAMILY,) and source.found == {"families": archives.COARSE_NAMES}
    got_families = {i.label: int(i.columns["family"][0]) for i in found if isinstance(i, RawImage)}
    assert got_families == dict(zip(TRAIN.labels.tolist(), archives.families(TRAIN).tolist(), strict=True)) | dict(
        zip(TEST.labels.tolist(), archives.families(TEST).tolist(), strict=True)
    )


def binary(path: Path, **members: bytes) -> Source:
    """An archive with some members changed; an empty one is left out."""
    whole = {
        "train.bin": archives.cifar100_records(TRAIN),
        "fine_label_names.txt": "\n".join(archives.FINE_NAMES).encode(),
        "coarse_label_names.txt": "\n".join(archives.COARSE_NAMES).encode(),
    } | {name.replace("_txt", ".txt").replace("_bin", ".bin"): data for name, data in members.items()}
    path.write_bytes(tar_bytes({f"cifar-100-binary/{name}": data for name, data in whole.items() if data}))
    return local(path)


def test_binary_archives_that_are_wrong(tmp_path: Path) -> None:
    path, records = tmp_path / "c.tar", archives.cifar100_records(TRAIN)

    def with_byte(at: int, value: int) -> bytes:
        return records[:at] + bytes([value]) + records[at + 1 :]

    refused(binary(path, train_bin=records[:-1]), "train.bin", "no multiple of the 3,074")
    refused(binary(path, train_bin=with_byte(4 * 3074 + 1, 100)), "record 4", f"byte {4 * 3074:,}", "label 100")
    refused(binary(path, train_bin=with_byte(7 * 3074, 20)), "record 7", f"byte {7 * 3074:,}", "label 20", "0 … 19")
    family = int(archives.families(TRAIN)[3])
    for record in (3, 103, 203):
        words = "record 103 gives class 3 the coarse label" if record == 3 else f"record {record} gives class 3"
        refused(binary(path, train_bin=with_byte(record * 3074, (family + 1) % 20)), "train.bin", words)
    names = "100 fine and 20 coarse label names (it has"
    refused(binary(path, fine_label_names_txt=b"cat\ndog"), f"{names} 2 and 20)", "not the whole official archive")
    refused(binary(path, coarse_label_names_txt=b""), f"{names} 100 and 0)")
    refused(binary(path, fine_label_names_txt=b"x" * 70_000), "fine_label_names.txt", "70,000 bytes")


def test_a_class_keeps_its_family_from_one_file_to_the_next(tmp_path: Path) -> None:
    moved = bytearray(archives.cifar100_records(TEST))
    moved[5 * 3074] = (moved[5 * 3074] + 1) % 20
    source = binary(tmp_path / "c.tar", test_bin=bytes(moved))
    refused(source, "test.bin", "record 5 gives class 5 the coarse label")


def pickled(path: Path, batch: bytes, **meta: object) -> Source:
    names = {"fine_label_names": list(archives.FINE_NAMES), "coarse_label_names": list(archives.COARSE_NAMES)} | meta
    members = {"train": batch, "meta": archives.python2_pickle(names)}
    path.write_bytes(tar_bytes({f"cifar-100-python/{name}": data for name, data in members.items()}))
    return local(path)


def test_pickled_archives_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "c.tar"
    fine, coarse = TRAIN.labels.tolist(), archives.families(TRAIN).tolist()
    for changes, *words in (
        ({"fine_labels": fine[:-1]}, "has 230 images and 229 b'fine_labels'"),
        ({"coarse_labels": coarse[:-1]}, "has 230 images and 229 b'coarse_labels'"),
        ({"fine_labels": [*fine[:-1], 100]}, "record 229 has label 100", "0 … 99"),
        ({"coarse_labels": [*coarse[:-1], 20]}, "record 229 has label 20", "0 … 19"),
        ({"coarse_labels": [*coarse[:-1], (coarse[-1] + 1) % 20]}, "record 229 gives class 29 the coarse label"),
        ({"coarse_labels": "abc"}, "b'coarse_labels' is no list of numbers"),
        ({"data": TRAIN.pixels.reshape(230, -1)[:, :100].copy()}, "b'data' is no uint8 array"),
    ):
        refused(pickled(path, archives.cifar100_pickle(TRAIN, **changes)), "train", *words)  # type: ignore[arg-type]
    whole = archives.cifar100_pickle(TRAIN)
    refused(pickled(path, whole, fine_label_names=["a"] * 99), "meta with 100 fine and 20 coarse", "has 0 and 20")
    refused(pickled(path, whole[:-4000]), "train", "is not a pickle")


def test_a_split_may_be_larger_than_other_files_but_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official training images are one pickle of 155 MB."""
    path = archives.cifar100_python(tmp_path / "c", TRAIN, TEST)
    small = local(path, limits=Limits(file_bytes=100_000))
    assert sum(1 for _ in read_images(small, "cifar100-python")) == 340
    monkeypatch.setattr(sources_cifar100, "PICKLE_BYTES", 700_000)
    with pytest.raises(FigmentError, match=r"train .* bytes, more than --max-file-mb"):
        list(read_images(local(path, limits=Limits(file_bytes=100_000)), "cifar100-python"))
    assert sum(1 for _ in read_images(local(path), "cifar100-python")) == 340


def test_the_opcodes_of_50_000_images_are_within_the_limit() -> None:
    """As cPickle writes them: a label one opcode, the name of a file two, a thousand items a piece."""
    many = replace(TRAIN, pixels=np.zeros((0, 3, 32, 32), np.uint8), labels=np.arange(50_000) % 100)
    labels = b"](" + b"".join(b"K" + bytes([n]) for n in many.labels) + b"e"
    files = b"](" + b"".join(b"U\x0bsome_am.png" + b"r" + i.to_bytes(4, "little") for i in range(50_000)) + b"e"
    data = b"\x80\x02}(U\x0bfine_labels" + labels + b"U\x0dcoarse_labels" + labels + b"U\x09filenames" + files + b"u."
    assert len(unpickle(data, sources_cifar100.PICKLE_OPCODES)[b"filenames"]) == 50_000
    with pytest.raises(PickleError, match=f"more than {OPCODES:,} opcodes"):
        unpickle(b"\x80\x02" + b"]" * (OPCODES + 2) + b".")


def test_images_are_read_as_they_are_taken(tmp_path: Path) -> None:
    many = Images(np.random.default_rng(0).integers(0, 256, (6000, 3, 32, 32), np.uint8), np.arange(6000) % 100)
    source = binary(tmp_path / "c.tar", train_bin=archives.cifar100_records(many))
    images = read_images(source, "cifar100-binary")
    next(images)
    assert source.bytes_read <= 9 << 20 < (tmp_path / "c.tar").stat().st_size
    images.close()
