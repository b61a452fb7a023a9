"""Data sets that are known by name: where their files lie in the web, what they must be, and who made them.

To add one: an entry in `KNOWN`, with the checksums as its publisher (or the library that most people read it with)
gives them. Its format must be one of `sources.FORMATS`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pyarrow import fs as pafs

from pipelines.data.download import Patience, PublishedFile, fetch, is_whole
from pipelines.data.ingest_options import IngestOptions, Layout, layout_of
from pipelines.data.sources_io import EncodedImage, Limits, RawImage, Source
from pipelines.errors import FigmentError


@dataclass(frozen=True)
class Known:
    """One data set in its official format."""

    name: str
    format: str
    shape: tuple[int, int, int] | None  # (C, H, W) of raw pixels; None: image files
    files: tuple[PublishedFile, ...]
    page: str
    published: str  # where the checksums stand
    citation: str
    licence: str

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def identity(self) -> str:
        """Of its contents, as published: the same before and after the download, wherever the files lie."""
        sums = "\n".join(f"{file.name} {file.bytes} {file.md5}" for file in self.files)
        return hashlib.sha256(sums.encode()).hexdigest()

    def folder(self, cache: Path) -> Path:
        return cache / "datasets" / self.name

    def missing(self, cache: Path) -> tuple[PublishedFile, ...]:
        """Files of which `cache` has none, or another one; `FigmentError` when that cannot be told."""
        try:
            return tuple(file for file in self.files if not is_whole(file, self.folder(cache) / file.name))
        except OSError as error:
            raise FigmentError(
                f"{self.folder(cache)} cannot be read ({error.strerror or error}): set FIGMENT_CACHE to another folder"
            ) from error

    def layout(self, options: IngestOptions) -> Layout:
        """What `options` come to for its images, of which nothing need be here yet."""
        if self.shape is None:
            return layout_of(self.format, EncodedImage("train", b"", 0, ""), options)
        return layout_of(self.format, RawImage("train", np.zeros(self.shape, np.uint8), 0, ""), options)

    def source(self, cache: Path, limits: Limits) -> Source:
        """Its files where `download` brings them."""
        path = self.folder(cache) if len(self.files) > 1 else self.folder(cache) / self.files[0].name
        about = {
            "url": self.page,
            "files": {file.name: f"md5:{file.md5}" for file in self.files},
            "citation": self.citation,
            "licence": self.licence,
        }
        own = frozenset(file.name for file in self.files)  # not what somebody unpacked beside them
        here = pafs.LocalFileSystem()
        return Source(here, str(path), self.name, limits=limits, identity=self.identity, own=own, about=about)


def download(
    known: Known,
    cache: Path,
    *,
    patience: Patience | None = None,
    on_progress: Callable[[PublishedFile, int], object] = lambda file, got: None,
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """Brings the files that are not in `cache` yet; `fetch` says how, and what it raises."""
    for file in known.files:
        target = known.folder(cache) / file.name
        fetch(file, target, patience=patience, on_progress=lambda got, file=file: on_progress(file, got), say=say)  # type: ignore[misc]


def nearest(name: str, known: Mapping[str, Known]) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower(), known, 1, cutoff=0.5)), None)


def _files(urls: tuple[str, ...], *files: tuple[str, int, str]) -> tuple[PublishedFile, ...]:
    return tuple(PublishedFile(name, size, md5, tuple(f"{url}/{name}" for url in urls)) for name, size, md5 in files)


_ENTRIES = (
    Known(
        name="mnist",
        format="idx",
        shape=(1, 28, 28),
        files=_files(
            (
                "http://yann.lecun.com/exdb/mnist",
                "https://ossci-datasets.s3.amazonaws.com/mnist",
                "https://storage.googleapis.com/cvdf-datasets/mnist",
            ),
            ("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            ("train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
            ("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
            ("t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        page="http://yann.lecun.com/exdb/mnist/",
        published="sizes: the official page; md5: torchvision, torchvision/datasets/mnist.py",
        citation='Y. LeCun, L. Bottou, Y. Bengio, P. Haffner (1998), "Gradient-Based Learning Applied to Document'
        ' Recognition"',
        licence="CC BY-SA 3.0, as Keras states it; the official page states none",
    ),
    Known(
        name="fashion-mnist",
        format="idx",
        shape=(1, 28, 28),
        files=_files(
            (
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",  # which speaks no https
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
                "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
            ),
            ("train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            ("train-labels-idx1-ubyte.gz", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
            ("t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
            ("t10k-labels-idx1-ubyte.gz", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
        page="https://github.com/zalandoresearch/fashion-mnist",
        published="md5: README.md of the page; sizes: of these files",
        citation='H. Xiao, K. Rasul, R. Vollgraf (2017), "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine'
        ' Learning Algorithms", arXiv 1708.07747',
        licence="MIT",
    ),
    Known(
        name="cifar10",
        format="cifar10-binary",
        shape=(3, 32, 32),
        files=_files(
            (
                "https://www.cs.toronto.edu/~kriz",
                "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10",
                "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets",
            ),
            ("cifar-10-binary.tar.gz", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"),
        ),
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        published="md5: the page",
        citation='A. Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images"',
        licence="none stated",
    ),
    Known(
        name="cifar100",
        format="cifar100-binary",
        shape=(3, 32, 32),
        files=_files(
            (
                "https://www.cs.toronto.edu/~kriz",
                "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets",
            ),
            ("cifar-100-binary.tar.gz", 168_513_733, "03b5dce01913d631647c71ecec9e9cb8"),
        ),
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        published="md5: the page; size: TensorFlow Datasets, url_checksums/cifar100.txt",
        citation='A. Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images"',
        licence="none stated",
    ),
    Known(  # without extra_32x32.mat, 1.3 GB: who wants it puts it beside the two and ingests the folder
        name="svhn",
        format="svhn",
        shape=(3, 32, 32),
        files=_files(
            ("http://ufldl.stanford.edu/housenumbers", "https://ufldl.stanford.edu/housenumbers"),
            ("train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
            ("test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3"),
        ),
        page="http://ufldl.stanford.edu/housenumbers/",
        published="md5: torchvision, torchvision/datasets/svhn.py; sizes: TensorFlow Datasets,"
        " url_checksums/svhn_cropped.txt",
        citation='Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu, A. Y. Ng (2011), "Reading Digits in Natural Images'
        ' with Unsupervised Feature Learning"',
        licence="for non-commercial use, as Hugging Face states it",
    ),
)

KNOWN: Mapping[str, Known] = {known.name: known for known in _ENTRIES}
