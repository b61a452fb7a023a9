"""Tiny archives in the official layouts, made on the spot, with the images that are in them."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from pyarrow import fs as pafs

from pipelines.data.sources_io import Source

CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_FOLDER = "cifar-10-batches"


@dataclass(frozen=True)
class Images:
    """What an archive was made of."""

    pixels: np.ndarray  # uint8 (N, C, H, W)
    labels: np.ndarray  # (N,)

    def rows(self) -> list[tuple[bytes, int]]:
        return sorted((image.tobytes(), int(label)) for image, label in zip(self.pixels, self.labels, strict=True))


def random_images(n: int, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, seed: int = 0) -> Images:
    rng = np.random.default_rng(seed)
    return Images(rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % classes)


def local(path: Path, **kwargs: object) -> Source:
    return Source(pafs.LocalFileSystem(), str(path), str(path), **kwargs)  # type: ignore[arg-type]


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


# --- CIFAR-10 -------------------------------------------------------------------------------------------------------


def cifar_records(images: Images) -> bytes:
    flat = images.pixels.reshape(len(images.pixels), -1)
    return np.concatenate([images.labels.astype(np.uint8)[:, None], flat], axis=1).tobytes()


def cifar10_binary(path: Path, batches: Sequence[Images], test: Images) -> Path:
    """The members stand in no particular order, as in the official archive."""
    members = {f"data_batch_{i}.bin": cifar_records(batch) for i, batch in enumerate(batches, 1)}
    members["batches.meta.txt"] = ("\n".join(CIFAR_NAMES) + "\n\n").encode()
    members |= {"test_batch.bin": cifar_records(test), "readme.html": b"<html>"}
    path.write_bytes(gzip.compress(tar_bytes({f"{CIFAR_FOLDER}-bin/{name}": data for name, data in members.items()})))
    return path


def cifar10_python(path: Path, batches: Sequence[Images], test: Images) -> Path:
    members = {f"data_batch_{i}": cifar_pickle(batch) for i, batch in enumerate(batches, 1)}
    members |= {
        "test_batch": cifar_pickle(test),
        "batches.meta": python2_pickle({"num_cases_per_batch": 10000, "label_names": list(CIFAR_NAMES)}),
    }
    path.write_bytes(gzip.compress(tar_bytes({f"{CIFAR_FOLDER}-py/{name}": data for name, data in members.items()})))
    return path


def cifar_pickle(images: Images) -> bytes:
    flat = images.pixels.reshape(len(images.pixels), -1)
    labels = [int(label) for label in images.labels]
    return python2_pickle({"batch_label": "training batch 1 of 5", "labels": labels, "data": flat})


def python2_pickle(value: object) -> bytes:
    """Protocol 2 as Python 2 wrote it: text is bytes, and NumPy's modules have their old names."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: object) -> bytes:
    match value:
        case str():
            return _python2(value.encode())
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case None:
            return b"N"
        case list():
            return b"](" + b"".join(map(_python2, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(_python2, value)) + b"t"
        case dict():
            return b"}(" + b"".join(_python2(k) + _python2(v) for k, v in value.items()) + b"u"
        case np.ndarray():
            dtype = (
                b"cnumpy\ndtype\n"
                + _python2(("u1", 0, 1))
                + b"R"
                + _python2((3, "|", None, None, None, -1, -1, 0))
                + b"b"
            )
            empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _python2((0,)) + _python2("b") + b"tR"
            state = (
                b"(" + _python2(1) + _python2(value.shape) + dtype + _python2(False) + _python2(value.tobytes()) + b"t"
            )
            return empty + state + b"b"
    raise TypeError(type(value))


# --- CIFAR-100 -------------------------------------------------------------------------------------------------------

FINE_NAMES, COARSE_NAMES = tuple(f"class_{i}" for i in range(100)), tuple(f"family_{i}" for i in range(20))


def families(images: Images) -> np.ndarray:
    """uint8 (N,): the coarse labels, five classes each, not in the order of the classes."""
    return (images.labels * 7 % 20).astype(np.uint8)


def cifar100_binary(path: Path, train: Images, test: Images) -> Path:
    members = {"fine_label_names.txt": "\n".join(FINE_NAMES) + "\n", "coarse_label_names.txt": "\n".join(COARSE_NAMES)}
    packed = {name: text.encode() for name, text in members.items()}
    for split, images in (("test", test), ("train", train)):
        packed[f"{split}.bin"] = cifar100_records(images)
    path.write_bytes(gzip.compress(tar_bytes({f"cifar-100-binary/{name}": data for name, data in packed.items()})))
    return path


def cifar100_records(images: Images) -> bytes:
    two = np.stack([families(images), images.labels.astype(np.uint8)], axis=1)
    return np.concatenate([two, images.pixels.reshape(len(images.pixels), -1)], axis=1).tobytes()


def cifar100_python(path: Path, train: Images, test: Images, **meta: object) -> Path:
    names = {"fine_label_names": list(FINE_NAMES), "coarse_label_names": list(COARSE_NAMES)} | meta
    members = {"file.txt~": b"", "train": cifar100_pickle(train), "test": cifar100_pickle(test)}
    members["meta"] = python2_pickle(names)
    path.write_bytes(gzip.compress(tar_bytes({f"cifar-100-python/{name}": data for name, data in members.items()})))
    return path


def cifar100_pickle(images: Images, **changes: object) -> bytes:
    batch: dict[str, object] = {
        "filenames": [f"image_s_{i:06d}.png" for i in range(len(images.labels))],
        "batch_label": "training batch 1 of 1",
        "fine_labels": [int(label) for label in images.labels],
        "coarse_labels": [int(label) for label in families(images)],
        "data": images.pixels.reshape(len(images.pixels), -1),
    }
    return python2_pickle(batch | changes)


# --- SVHN -----------------------------------------------------------------------------------------------------------


def svhn(folder: Path, splits: Mapping[str, Images], *, packed: bool = True, labels: type = np.uint8) -> Path:
    """As SciPy writes files of MATLAB 5."""
    folder.mkdir(exist_ok=True)
    for split, images in splits.items():
        digits = np.where(images.labels == 0, 10, images.labels).astype(labels)[:, None]
        arrays = {"X": images.pixels.transpose(2, 3, 1, 0), "y": digits}
        scipy.io.savemat(folder / f"{split}_32x32.mat", arrays, do_compression=packed)
    return folder


# --- IDX ------------------------------------------------------------------------------------------------------------


def idx(folder: Path, train: Images, test: Images, *, compressed: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for stem, images in (("train", train), ("t10k", test)):
        n, _, height, width = images.pixels.shape
        files = {
            "images-idx3": struct.pack(">4I", 0x803, n, height, width) + images.pixels.tobytes(),
            "labels-idx1": struct.pack(">2I", 0x801, n) + images.labels.astype(np.uint8).tobytes(),
        }
        for kind, data in files.items():
            path = folder / f"{stem}-{kind}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(data) if compressed else data)
    return folder


# --- CelebA ---------------------------------------------------------------------------------------------------------

CELEBA_NAMES = tuple(f"Attribute_{i}" for i in range(40))


def celeba(folder: Path, files: Sequence[bytes], attributes: np.ndarray, parts: Sequence[int]) -> Path:
    """000001.jpg …, each with its 40 attributes (0 or 1) and its part (0, 1 or 2), spaced as the official lists are."""
    folder.mkdir(exist_ok=True)
    names = [f"{i:06d}.jpg" for i in range(1, len(files) + 1)]
    zip_of(folder / "img_align_celeba.zip", {f"img_align_celeba/{n}": f for n, f in zip(names, files, strict=True)})
    rows = [f"{n} {' '.join(f'{2 * int(v) - 1:2d}' for v in row)}" for n, row in zip(names, attributes, strict=True)]
    head = [str(len(files)), " ".join(CELEBA_NAMES) + " "]
    (folder / "list_attr_celeba.txt").write_text("\n".join([*head, *rows, ""]))
    partition = [f"{n} {part}" for n, part in zip(names, parts, strict=True)]
    (folder / "list_eval_partition.txt").write_text("\n".join([*partition, ""]))
    return folder


def zip_of(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """With an entry of its own for each folder, as archivers write them."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for parent in sorted({name.rpartition("/")[0] for name in members} - {""}):
            archive.mkdir(parent)
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# --- image files ----------------------------------------------------------------------------------------------------


def picture(seed: int, width: int = 80, height: int = 60, mode: str = "RGB", form: str = "JPEG") -> bytes:
    """A smooth picture, so that JPEG changes it little."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    sink = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(sink, form)
    return sink.getvalue()


def imagenet_train(path: Path, synsets: Mapping[str, Sequence[bytes]]) -> Path:
    outer = {
        f"{synset}.tar": tar_bytes({f"{synset}_{i}.JPEG": data for i, data in enumerate(files)})
        for synset, files in synsets.items()
    }
    path.write_bytes(tar_bytes(outer))
    return path


def imagenet_val(path: Path, files: Sequence[bytes]) -> Path:
    """The last one first: the number in the name counts, not the place in the archive."""
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, len(files) + 1)]
    path.write_bytes(tar_bytes(dict(reversed(list(zip(names, files, strict=True))))))
    return path


def tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root
