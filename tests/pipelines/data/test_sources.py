"""Every official format as it is, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import lzma
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.sources import FORMATS, detect_format, fingerprint, read_images
from pipelines.data.sources_io import EncodedImage, ImageFile, RawImage, Source, SourceImage
from pipelines.errors import FigmentError
from tests.pipelines.data import archives
from tests.pipelines.data.archives import CIFAR_NAMES, local, picture, random_images, tar_bytes

TRAIN, MORE, TEST = random_images(13, seed=1), random_images(12, seed=2), random_images(7, seed=3)


def read(source: Source, format_name: str | None = None) -> tuple[list[SourceImage], tuple[str, ...]]:
    images = read_images(source, format_name or detect_format(source))
    found = []
    while True:
        try:
            found.append(next(images))
        except StopIteration as end:
            return found, end.value


def rows(found: list[SourceImage], split: str) -> list[tuple[bytes, int]]:
    return sorted((i.pixels.tobytes(), i.label) for i in found if isinstance(i, RawImage) and i.split == split)


def both(one: archives.Images, other: archives.Images) -> list[tuple[bytes, int]]:
    return sorted(one.rows() + other.rows())


# --- the formats as they are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [archives.cifar10_binary, archives.cifar10_python])
def test_cifar10(tmp_path: Path, make: Callable[..., Path]) -> None:
    found, names = read(local(make(tmp_path / "any-name", [TRAIN, MORE], TEST)))
    assert names == CIFAR_NAMES
    assert rows(found, "train") == both(TRAIN, MORE)
    assert rows(found, "test") == TEST.rows()
    assert found[0].pixels.shape == (3, 32, 32)  # type: ignore[union-attr]


@pytest.mark.parametrize("compress", [lzma.compress, lambda data: data, gzip.compress])
def test_the_compression_is_seen_in_the_bytes(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = archives.cifar10_binary(tmp_path / "a", [TRAIN], TEST)
    path.write_bytes(compress(gzip.decompress(path.read_bytes())))
    assert rows(read(local(path))[0], "train") == TRAIN.rows()


@pytest.mark.parametrize("compressed", [True, False])
def test_idx(tmp_path: Path, compressed: bool) -> None:
    train, test = random_images(600, (1, 28, 28)), random_images(9, (1, 28, 28))
    folder = archives.idx(tmp_path / "mnist", train, test, compressed=compressed)
    found, names = read(local(folder))
    assert names == tuple("0123456789")
    assert rows(found, "train") == train.rows()
    assert rows(found, "test") == test.rows()
    one_file = folder / f"train-images-idx3-ubyte{'.gz' if compressed else ''}"
    assert rows(read(local(one_file))[0], "train") == train.rows()


def test_imagenet_train_streams_nested_tars(tmp_path: Path) -> None:
    files = {f"n{i:08d}": [picture(10 * i + k) for k in range(3)] for i in (3, 1, 2)}
    path = archives.imagenet_train(tmp_path / "train.tar", files)
    found, names = read(local(path))
    assert names == ("n00000001", "n00000002", "n00000003")
    got = [(i.label, i.data) for i in found if isinstance(i, EncodedImage)]
    assert got == [(names.index(synset), data) for synset in files for data in files[synset]]
    # The offset that messages give is where the file's bytes are in the archive.
    member = found[4].member
    offset = int(member.partition("(byte ")[2].rstrip(")").replace(",", ""))
    data = files["n00000001"][1]
    assert path.read_bytes()[offset : offset + len(data)] == data


def labels_by_image(source: Source) -> dict[bytes, str]:
    found, names = read(source, "imagenet-train")
    return {image.data: names[image.label] for image in found if isinstance(image, EncodedImage)}


def test_labels_do_not_hang_on_the_order_of_the_archive(tmp_path: Path) -> None:
    """A label is a place among the sorted ids, however the archive was packed, or the archive is refused."""
    files = {f"n{i:08d}": [picture(10 * i + k) for k in range(2)] for i in (1, 2, 3)}
    wanted = {data: synset for synset, images in files.items() for data in images}
    for order in ((1, 2, 3), (3, 1, 2), (2, 3, 1)):
        path = archives.imagenet_train(tmp_path / "train.tar", {f"n{i:08d}": files[f"n{i:08d}"] for i in order})
        names = read(local(path), "imagenet-train")[1]
        assert names == tuple(sorted(files))
        assert labels_by_image(local(path)) == wanted
        packed = tmp_path / "train.tar.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        if order == (1, 2, 3):
            assert labels_by_image(local(packed)) == wanted and read(local(packed), "imagenet-train")[1] == names
        else:
            refused(local(packed), "stands after", "tar --sort=name", format_name="imagenet-train")


def test_the_archive_is_read_as_images_are_taken(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(1 << 20)
    path = archives.imagenet_train(tmp_path / "train.tar", {f"n{i:08d}": [noise] * 4 for i in range(6)})
    source = local(path)
    images = read_images(source, "imagenet-train")
    next(images)
    assert source.bytes_read <= 9 << 20 < path.stat().st_size
    images.close()


def test_imagenet_val_takes_labels_by_the_number_in_the_name(tmp_path: Path) -> None:
    files = [picture(i) for i in range(3)]
    path = archives.imagenet_val(tmp_path / "val.tar", files)
    found, names = read(local(path))
    assert names == () and {i.label for i in found} == {-1} and {i.split for i in found} == {"val"}

    found, names = read(local(path, labels=("n00000007", "n00000002", "n00000007"), labels_name="truth.txt"))
    assert names == ("n00000002", "n00000007")
    assert {i.data: i.label for i in found if isinstance(i, EncodedImage)} == dict(zip(files, (1, 0, 1), strict=True))

    found, names = read(local(path, labels=("3", "1", "2"), labels_name="truth.txt"))
    assert names == ("1", "2", "3")
    assert {i.data: i.label for i in found if isinstance(i, EncodedImage)} == dict(zip(files, (2, 0, 1), strict=True))


def test_folders_with_and_without_splits(tmp_path: Path) -> None:
    image = picture(0)
    names = ["train/b/1.png", "train/a/deeper/2.JPEG", "valid/b/3.webp", "test/c/4.png"]
    found, labels = read(local(archives.tree(tmp_path / "splits", dict.fromkeys([*names, "train/a/notes.txt"], image))))
    assert labels == ("a", "b", "c")
    got = {(i.member, i.split, i.label) for i in found if isinstance(i, ImageFile)}
    assert got == set(zip(names, ("train", "train", "val", "test"), (1, 0, 1, 2), strict=True))

    found, labels = read(
        local(archives.tree(tmp_path / "plain", {"cat/1.png": image, "ant/2.png": image, ".x/3.png": image}))
    )
    assert labels == ("ant", "cat") and [(i.split, i.label) for i in found] == [("train", 0), ("train", 1)]

    found, labels = read(local(archives.tree(tmp_path / "flat", {"1.png": image, "2.png": image})))
    assert labels == () and [i.label for i in found] == [-1, -1]


def test_the_fingerprint_changes_with_a_file(tmp_path: Path) -> None:
    root = archives.tree(tmp_path / "t", {"a/1.png": picture(0), "b/1.png": picture(1)})
    before = fingerprint(local(root))
    assert fingerprint(local(root)) == before
    archives.tree(root, {"b/1.png": picture(1) + b"x"})
    assert fingerprint(local(root)) != before


# --- what can be wrong ------------------------------------------------------------------------------------------------


def refused(source: Source, *parts: str, format_name: str | None = None) -> str:
    with pytest.raises(FigmentError) as error:
        read(source, format_name)
    message = str(error.value)
    for part in (source.name, *parts):
        assert part in message, message
    assert "\n" not in message
    return message


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    return archives.cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", [TRAIN, MORE], TEST)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    return archives.imagenet_train(tmp_path / "train.tar", {f"n{i:08d}": [picture(i)] * 3 for i in range(3)})


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.97])
def test_a_gzip_that_is_cut_off(cifar: Path, share: float) -> None:
    data = cifar.read_bytes()
    cifar.write_bytes(data[: int(len(data) * share)])
    refused(local(cifar), "byte", format_name="cifar10-binary")


def test_a_gzip_with_a_flipped_bit(cifar: Path) -> None:
    data = bytearray(cifar.read_bytes())
    data[len(data) // 2] ^= 0x10
    cifar.write_bytes(data)
    refused(local(cifar), "byte", format_name="cifar10-binary")


def test_a_gzip_whose_checksum_is_wrong(cifar: Path) -> None:
    data = bytearray(cifar.read_bytes())
    data[-6] ^= 1  # the trailer: after the last byte that tarfile itself wants to see
    cifar.write_bytes(data)
    refused(local(cifar), "CRC")


def test_a_tar_that_is_cut_off_anywhere(imagenet: Path) -> None:
    data = imagenet.read_bytes()
    whole = len(data.rstrip(b"\0"))
    for cut in sorted({*range(512, whole, 2048), *range(512, whole, 512 * 7), whole - 1}):
        imagenet.write_bytes(data[:cut])
        refused(local(imagenet), "byte", format_name="imagenet-train")


def test_a_tar_that_is_cut_off_between_members_has_no_end_mark(tmp_path: Path) -> None:
    data = tar_bytes({"ILSVRC2012_val_00000001.JPEG": picture(0), "ILSVRC2012_val_00000002.JPEG": picture(1)})
    path = tmp_path / "val.tar"
    path.write_bytes(data[: 512 + -(-len(picture(0)) // 512) * 512])
    refused(local(path), "byte", format_name="imagenet-val")


def test_a_tar_with_a_damaged_header_or_a_hole(imagenet: Path) -> None:
    data = imagenet.read_bytes()
    second = data.index(b"n00000001.tar")
    imagenet.write_bytes(data[:second] + b"\xff" * 8 + data[second + 8 :])
    refused(local(imagenet), f"byte {second:,}", "damaged", format_name="imagenet-train")
    imagenet.write_bytes(data[:second] + bytes(1024) + data[second + 1024 :])
    refused(local(imagenet), "after the end mark", format_name="imagenet-train")


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "page.tar.gz"
    path.write_bytes(b"<!doctype html><title>404 Not Found</title>" * 100)
    refused(local(path), "byte 0")
    path.write_bytes(b"")
    refused(local(path), "byte 0")
    path.write_bytes(tar_bytes({"something.txt": b"x"}))
    refused(local(path), "something.txt", *FORMATS)
    refused(local(path), "not the whole official archive", format_name="cifar10-binary")
    refused(local(tmp_path / "nothing"), "no such file")
    refused(local(archives.tree(tmp_path / "empty", {"a/readme.txt": b"x"})), "no images")


def test_an_unknown_format_names_the_nearest(cifar: Path) -> None:
    with pytest.raises(FigmentError, match=r"'cifar10-bin'.*did you mean 'cifar10-binary'.*imagenet-train"):
        read(local(cifar), "cifar10-bin")


def cifar_with(path: Path, **members: bytes) -> Source:
    names = {"data_batch_1": archives.cifar_records(TRAIN), "batches_meta": "\n".join(CIFAR_NAMES).encode()} | members
    files = {"data_batch_1": "data_batch_1.bin", "batches_meta": "batches.meta.txt"}
    path.write_bytes(tar_bytes({f"cifar-10-batches-bin/{files[name]}": data for name, data in names.items()}))
    return local(path)


def test_cifar_records_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "c.tar"
    refused(cifar_with(path, data_batch_1=archives.cifar_records(TRAIN)[:-1]), "data_batch_1.bin", "3,073")
    wrong = replace(TRAIN, labels=np.where(np.arange(13) == 4, 11, TRAIN.labels))
    refused(cifar_with(path, data_batch_1=archives.cifar_records(wrong)), "record 4", f"byte {4 * 3073:,}", "label 11")
    refused(cifar_with(path, batches_meta=b"cat\ndog"), "batches.meta.txt", "ten label names")


def python_cifar_with(path: Path, batch: bytes) -> Source:
    meta = archives.python2_pickle({"label_names": list(CIFAR_NAMES)})
    path.write_bytes(tar_bytes({"cifar-10-batches-py/data_batch_1": batch, "cifar-10-batches-py/batches.meta": meta}))
    return local(path)


def test_cifar_pickles_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "c.tar"
    for value, part in (
        ({"labels": [0] * 13}, "b'data'"),
        ({"data": TRAIN.pixels.reshape(13, -1)[:, :100].copy(), "labels": [0] * 13}, "b'data'"),
        ({"data": TRAIN.pixels.reshape(13, -1), "labels": [0] * 12}, "b'labels'"),
        ({"data": TRAIN.pixels.reshape(13, -1), "labels": [0] * 12 + [10]}, "record 12 has label 10"),
        ([1, 2], "dict"),
    ):
        refused(python_cifar_with(path, archives.python2_pickle(value)), "data_batch_1", part)
    refused(python_cifar_with(path, archives.cifar_pickle(TRAIN)[:-4000]), "data_batch_1", "pickle")


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    trace = tmp_path / "was-here"
    source = python_cifar_with(tmp_path / "c.tar", pickle.dumps({b"data": _Evil(trace)}))
    refused(source, "data_batch_1", "it asks for")
    assert not trace.exists()


def test_idx_files_that_are_wrong(tmp_path: Path) -> None:
    train, test = random_images(5, (1, 4, 4)), random_images(3, (1, 4, 4))

    def folder(**changes: Callable[[bytes], bytes]) -> Source:
        root = archives.idx(tmp_path / "idx", train, test, compressed=False)
        for name, change in changes.items():
            path = root / f"train-{name}-ubyte".replace("_", "-")
            path.write_bytes(change(path.read_bytes()))
        return local(root)

    refused(folder(images_idx3=lambda d: b"\0\0\x08\x01" + d[4:]), "train-images-idx3-ubyte", "byte 0", "0x00000801")
    refused(folder(images_idx3=lambda d: d[:-1]), "train-images-idx3-ubyte", "byte 16", "1 bytes short")
    refused(folder(images_idx3=lambda d: d[:9]), "train-images-idx3-ubyte", "header")
    refused(folder(images_idx3=lambda d: d + b"x"), "train-images-idx3-ubyte", "goes on after")
    refused(folder(labels_idx1=lambda d: d[:4] + b"\0\0\0\4" + d[8:]), "5 images", "4 labels")
    refused(folder(labels_idx1=lambda d: d[:-1]), "train-labels-idx1-ubyte", "1 bytes short")
    (tmp_path / "idx" / "train-labels-idx1-ubyte").unlink()
    refused(local(tmp_path / "idx"), "without its labels")


def test_imagenet_archives_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    path.write_bytes(tar_bytes({"n00000001.JPEG": picture(0)}))
    refused(local(path), "n00000001.JPEG", "no tar", format_name="imagenet-train")
    path.write_bytes(tar_bytes({"n00000001.tar": tar_bytes({}), "x/n00000001.tar": tar_bytes({})}))
    refused(local(path), "second tar of class n00000001")
    path.write_bytes(tar_bytes({"n00000001.tar": tar_bytes({})}))
    refused(local(path), "no images")


def test_ground_truth_that_is_wrong(tmp_path: Path) -> None:
    path = archives.imagenet_val(tmp_path / "val.tar", [picture(i) for i in range(3)])

    def complaint(*lines: str) -> str:
        with pytest.raises(FigmentError) as error:
            read(local(path, labels=lines, labels_name="truth.txt"))
        assert "truth.txt" in str(error.value)
        return str(error.value)

    assert "2 lines" in complaint("1", "2")
    assert "3 images" in complaint("1", "2", "3", "4")
    assert "line 2: label 1001" in complaint("1", "1001", "3")
    assert "line 3: 'cat'" in complaint("1", "2", "cat")
    assert "line 2: '0'" in complaint("1", "0", "2")
    assert "mixes" in complaint("1", "n00000001", "2")
    assert "no labels" in complaint()


def test_images_beside_folders_of_classes(tmp_path: Path) -> None:
    refused(local(archives.tree(tmp_path / "t", {"a/1.png": picture(0), "2.png": picture(0)})), "2.png", "no class")
