"""The samples that the repository ships are what their README says, and their scripts take what they should."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.sources import detect_format, read_images
from pipelines.data.sources_io import RawImage
from tests.pipelines.data import archives
from tests.pipelines.data.archives import CIFAR_NAMES, Images, local, random_images

DATA = Path(__file__).parents[3] / "data"
SAMPLE = DATA / "cifar-10-sample.tar.xz"
MNIST_SAMPLE = DATA / "mnist-sample"


def readme(chapter: str) -> str:
    return (DATA / "README.md").read_text().partition(f"## `{chapter}`")[2].partition("\n## ")[0]


def test_the_cifar_sample_is_what_its_readme_says() -> None:
    data = SAMPLE.read_bytes()
    assert len(data) < 13e6
    sums = re.findall(r"`([0-9a-f]{64})`", readme(SAMPLE.name))
    assert sums == [hashlib.sha256(data).hexdigest(), hashlib.sha256(lzma.decompress(data)).hexdigest()]
    source = local(SAMPLE)
    assert detect_format(source) == "cifar10-binary"
    images = [image for image in read_images(source, "cifar10-binary") if isinstance(image, RawImage)]
    for split, n in (("train", 4096), ("test", 1024)):
        counts = Counter(image.label for image in images if image.split == split)
        assert sum(counts.values()) == n and set(counts) == set(range(10))
        assert max(counts.values()) - min(counts.values()) <= 1
    # Photographs, not noise: neighbouring pixels are alike.
    pixels = np.stack([image.pixels for image in images[:200]]).astype(int)
    assert np.abs(np.diff(pixels, axis=-1)).mean() < 15


def test_the_cifar_script_takes_the_first_of_each_class(tmp_path: Path) -> None:
    def numbered(n: int) -> Images:
        """Images that are their number and else black: told apart, and compressed in no time."""
        pixels = np.zeros((n, 3072), np.uint8)
        pixels[:, :2] = np.arange(n, dtype="<u2")[:, None].view(np.uint8)
        return Images(pixels.reshape(n, 3, 32, 32), np.random.default_rng(n).permutation(np.arange(n) % 10))

    batch, test = numbered(4500), numbered(1200)
    official = archives.cifar10_binary(tmp_path / "official.tar.gz", [batch], test)
    made = tmp_path / "sample.tar.xz"
    script = [sys.executable, str(DATA / "make_cifar_sample.py"), str(official), str(made)]
    out = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert hashlib.sha256(made.read_bytes()).hexdigest() in out
    images = read_images(local(made), "cifar10-binary")
    got: list[RawImage] = []
    while True:
        try:
            image = next(images)
        except StopIteration as end:
            assert end.value == CIFAR_NAMES
            break
        assert isinstance(image, RawImage)
        got.append(image)
    for split, source, n in (("train", batch, 4096), ("test", test, 1024)):
        taken = [image for image in got if image.split == split]
        assert len(taken) == n
        for label in range(10):
            wanted = source.pixels[source.labels == label][: n // 10 + (label < n % 10)]
            assert np.array_equal(np.stack([image.pixels for image in taken if image.label == label]), wanted)


def test_the_mnist_sample_is_what_its_readme_says() -> None:
    said = readme("mnist-sample/")
    rows = re.findall(r"^\| `(\S+\.gz)` \| `(\w{64})` \| `(\w{64})` \|$", said, re.MULTILINE)
    files = {name: (MNIST_SAMPLE / name).read_bytes() for name, _, _ in rows}
    assert {path.name for path in MNIST_SAMPLE.iterdir()} == set(files) and len(files) == 4
    for name, packed, plain in rows:
        assert hashlib.sha256(files[name]).hexdigest() == packed
        assert hashlib.sha256(gzip.decompress(files[name])).hexdigest() == plain
    size = sum(map(len, files.values()))
    assert f"{size:,} bytes" in said and size < 3e6
    source = local(MNIST_SAMPLE)
    assert detect_format(source) == "idx"
    images = [image for image in read_images(source, "idx") if isinstance(image, RawImage)]
    for split, n in (("train", 1000), ("test", 200)):
        assert Counter(image.label for image in images if image.split == split) == dict.fromkeys(range(10), n)
    # Digits, not noise: most pixels are black, and neighbouring ones are alike.
    pixels = np.stack([image.pixels for image in images]).astype(int)
    assert 0.75 < (pixels == 0).mean() < 0.85 and np.abs(np.diff(pixels, axis=-1)).mean() < 30
    assert len({image.pixels.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("compressed", [True, False])
def test_the_mnist_script_takes_evenly_of_each_class(tmp_path: Path, compressed: bool) -> None:
    def numbered(n: int) -> Images:
        """Images whose first two pixels are their number: told apart, and compressed in no time."""
        pixels = np.zeros((n, 784), np.uint8)
        pixels[:, :2] = np.arange(n, dtype="<u2")[:, None].view(np.uint8)
        return Images(pixels.reshape(n, 1, 28, 28), np.random.default_rng(n).permutation(np.arange(n) % 10))

    train, test = numbered(12_340), numbered(2_000)
    archives.idx(tmp_path / "official", train, test, compressed=compressed)
    script = [sys.executable, str(DATA / "make_mnist_sample.py"), str(tmp_path / "official")]
    for name in ("made", "again"):
        out = subprocess.run([*script, str(tmp_path / name)], check=True, capture_output=True, text=True).stdout
    made, again = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("made", "again"))
    assert made == again and len(made) == 4
    assert all(hashlib.sha256(data).hexdigest() in out for data in made.values())
    got = [image for image in read_images(local(tmp_path / "made"), "idx") if isinstance(image, RawImage)]
    for split, source, n in (("train", train, 1000), ("test", test, 200)):
        taken = [image for image in got if image.split == split]
        numbers = [int(image.pixels.reshape(-1)[:2].view("<u2")[0]) for image in taken]
        assert numbers == sorted(set(numbers)) and [image.label for image in taken] == source.labels[numbers].tolist()
        for label in range(10):
            places = np.flatnonzero(source.labels == label)
            chosen = np.searchsorted(places, [i for i in numbers if source.labels[i] == label])
            assert len(chosen) == n and chosen[0] == 0
            assert set(np.diff(chosen)) <= {len(places) // n, len(places) // n + 1}


def test_the_mnist_script_refuses_too_few(tmp_path: Path) -> None:
    archives.idx(tmp_path / "official", random_images(500, (1, 28, 28)), random_images(500, (1, 28, 28)))
    script = [sys.executable, str(DATA / "make_mnist_sample.py"), str(tmp_path / "official"), str(tmp_path / "made")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: 1000 images of class 0 wanted, 50 found\n"
    assert not (tmp_path / "made").exists()
