"""The sample that the repository ships is what its README says, and its script takes what it should."""

from __future__ import annotations

import hashlib
import lzma
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from pipelines.data.sources import detect_format, read_images
from pipelines.data.sources_io import RawImage
from tests.pipelines.data import archives
from tests.pipelines.data.archives import CIFAR_NAMES, Images, local

DATA = Path(__file__).parents[3] / "data"
SAMPLE = DATA / "cifar-10-sample.tar.xz"


def test_the_sample_is_what_its_readme_says() -> None:
    readme, data = (DATA / "README.md").read_text(), SAMPLE.read_bytes()
    assert len(data) < 13e6
    sums = re.findall(r"`([0-9a-f]{64})`", readme)
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


def test_the_script_takes_the_first_of_each_class(tmp_path: Path) -> None:
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
