"""Stacked MNIST: which digits make an image, what the script writes, and that an ingest reads it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs

from models.metrics.modes import stacked_modes
from pipelines.data.columns import Column
from pipelines.data.sources import detect_format, read_images
from pipelines.data.sources_io import RawImage, Source

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "data/stack_digits.py"
SAMPLE = ROOT / "data/mnist-sample"


def _module(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # where the script beside it looks
    spec.loader.exec_module(module)
    return module


mnist = _module(ROOT / "data/make_mnist_sample.py")
made = _module(SCRIPT)


def run(folder: Path, *options: str, mnist_folder: Path = SAMPLE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(mnist_folder), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True)


def written(folder: Path, *options: str) -> bytes:
    done = run(folder, "--train", "700", "--test", "30", *options)
    assert done.returncode == 0, done.stderr
    assert "train: 700 of 700 images" in done.stdout and "test: 30 of 30 images" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["stacked-mnist.npz"]
    return (folder / "stacked-mnist.npz").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacked")
    written(folder)
    return folder


def test_three_digits_by_hand_one_a_channel() -> None:
    pixels = np.stack([np.full((28, 28), grey, np.uint8) for grey in (10, 20, 30)])
    image = made.stacked(pixels, np.array([[2, 0, 1], [1, 1, 1]]), 32)
    assert image.shape == (2, 3, 32, 32) and image.dtype == np.uint8
    assert [image[0, c, 2:30, 2:30].tolist() for c in range(3)] == [pixels[i].tolist() for i in (2, 0, 1)]
    image[:, :, 2:30, 2:30] = 0
    assert not image.any()  # black all around
    assert np.array_equal(made.stacked(pixels, np.array([[0, 1, 2]]), 28)[0], pixels)


def test_digits_are_drawn_alike_and_independently() -> None:
    """Of 10 digits 40,000 times three: each channel within 5 deviations of a tenth, each pair of a hundredth."""
    places = made.draw(40_000, 0, "train", 10)
    assert places.min() == 0 and places.max() == 9
    for channel in places.T:
        assert np.abs(np.bincount(channel, minlength=10) - 4000).max() < 5 * np.sqrt(4000 * 0.9)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs = np.bincount(places[:, a] * 10 + places[:, b], minlength=100)
        assert np.abs(pairs - 400).max() < 5 * np.sqrt(400)


def test_the_drawing_is_that_of_every_machine_and_fewer_are_the_first_of_more() -> None:
    """PCG64's doubles are fixed by its definition; the numbers are those that were drawn when this was written."""
    assert made.draw(2, 0, "train", 60_000).tolist() == [[12459, 20938, 16702], [51132, 41379, 54077]]
    assert np.array_equal(made.draw(5, 3, "test", 700), made.draw(9, 3, "test", 700)[:5])
    assert not np.array_equal(made.draw(9, 3, "test", 700), made.draw(9, 3, "train", 700))
    assert not np.array_equal(made.draw(9, 3, "test", 700), made.draw(9, 4, "test", 700))


def test_images_labels_and_digits_are_those_of_the_sample(folder: Path) -> None:
    with np.load(folder / "stacked-mnist.npz", allow_pickle=False) as file:
        members = {name: file[name] for name in file.files}
    about = json.loads(members.pop("about.json").tobytes())
    assert about["columns"] == {"digits": ["red", "green", "blue"]}
    assert about["labels"] == [f"{a}{b}{c}" for a in range(10) for b in range(10) for c in range(10)]
    for split, stem, n in (("train", "train", 700), ("test", "t10k", 30)):
        pixels = mnist.read(SAMPLE, f"{stem}-images-idx3-ubyte", 3)
        digits_of = mnist.read(SAMPLE, f"{stem}-labels-idx1-ubyte", 1)
        images, labels, digits = (members.pop(f"{split}/{name}") for name in ("images", "labels", "digits"))
        places = made.draw(n, 0, split, len(pixels))
        assert images.dtype == np.uint8 and images.shape == (n, 3, 28, 28)
        assert all(np.array_equal(images[i, c], pixels[places[i, c]]) for i in range(n) for c in range(3))
        assert np.array_equal(digits, digits_of[places])
        assert labels.tolist() == stacked_modes(torch.from_numpy(digits)).tolist()
        assert [int(about["labels"][label]) for label in labels] == labels.tolist()
    assert not members


def test_an_ingest_reads_it(folder: Path) -> None:
    source = Source(pafs.LocalFileSystem(), str(folder), "stacked")
    assert detect_format(source) == "arrays"
    images = [image for image in read_images(source, "arrays") if isinstance(image, RawImage)]
    assert [image.split for image in images] == ["train"] * 700 + ["test"] * 30
    assert source.columns == (Column("digits", ("red", "green", "blue"), "uint8"),)
    last = images[-1]
    assert last.label == np.asarray(last.columns["digits"]).astype(int) @ [100, 10, 1]


def test_the_same_seed_writes_the_same_bytes_and_another_size_pads(folder: Path, tmp_path: Path) -> None:
    assert written(tmp_path / "again") == (folder / "stacked-mnist.npz").read_bytes()
    written(tmp_path / "wide", "--size", "32")
    with np.load(folder / "stacked-mnist.npz") as plain, np.load(tmp_path / "wide/stacked-mnist.npz") as wide:
        assert np.array_equal(wide["test/images"][:, :, 2:30, 2:30], plain["test/images"])
        assert wide["test/images"].shape == (30, 3, 32, 32)


def test_what_cannot_be_stacked_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = run(target, "--train", "0")
    assert done.returncode == 2 and "--train and --test are 1 or more" in done.stderr
    done = run(target, mnist_folder=tmp_path)
    assert done.returncode == 1 and "has no train-images-idx3-ubyte" in done.stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in SAMPLE.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    images = broken / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:5000])
    done = run(target, mnist_folder=broken)
    assert done.returncode == 1 and "cannot be read, fetch them again" in done.stderr
    assert "Traceback" not in done.stderr
    mnist.write(images, np.zeros((10_000, 20, 20), np.uint8))
    done = run(target, mnist_folder=broken)
    assert done.returncode == 1 and "28 x 28 pixels are stacked, not labels up to 9 of 20 x 20" in done.stderr
    labels = gzip.decompress((broken / "train-labels-idx1-ubyte.gz").read_bytes())
    (broken / "train-labels-idx1-ubyte.gz").write_bytes(labels[:3] + b"\x03" + labels[4:])
    assert run(target, mnist_folder=broken).returncode == 1
    assert not target.exists()


def test_the_page_says_what_the_script_does() -> None:
    page = (ROOT / "docs/data/stacked-mnist.md").read_text()
    text = SCRIPT.read_text()
    for option, number in (("--train", "128_000"), ("--test", "26_000")):
        assert f'"{option}", type=int, default={number}' in text
        assert number.replace("_", ",") in page
    assert "data/stack_digits.py" in page and "stacked-mnist.npz" in page
