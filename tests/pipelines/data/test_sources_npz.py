"""Arrays of a script: read as they are, and refused in one sentence where they are anything else."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.columns import Column
from pipelines.data.sources import detect_format, read_images
from pipelines.data.sources_io import Limits, RawImage
from pipelines.errors import FigmentError
from tests.pipelines.data.archives import local

ROOT = Path(__file__).parents[3]
Arrays = dict[str, np.ndarray]


def about(*names: str, **columns: object) -> np.ndarray:
    told = {"labels": names, "columns": columns} if columns else {"labels": names}
    return np.frombuffer(json.dumps(told).encode(), np.uint8)


def with_columns(**arrays: object) -> Arrays:
    """Two columns beside the images, and what a test changes."""
    rng = np.random.default_rng(1)
    whole: dict[str, object] = {
        "about__json": about("no", "yes", factors=["a", "b", "c"], balls=["count"]),
        "train__balls": np.arange(7, dtype=np.int32)[:, None],
        "test__balls": np.array([[7], [8]], np.int32),
        "test__factors": rng.normal(size=(2, 3)).astype(np.float32),
    }
    return changed(**{**whole, **arrays})


def good() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "train/images": rng.integers(0, 256, (7, 1, 6, 5), np.uint8),
        "train/labels": np.array([0, 1, 1, 0, 1, -1, 0]),
        "train/factors": rng.normal(size=(7, 3)).astype(np.float32),
        "test/images": rng.integers(0, 256, (2, 1, 6, 5), np.uint8),
        "about.json": about("no", "yes"),
    }


def saved(folder: Path, arrays: Arrays) -> Path:
    path = folder / "made.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def read(path: Path, limits: Limits | None = None) -> tuple[list[RawImage], tuple[str, ...]]:
    found: list[RawImage] = []
    images = read_images(local(path, limits=limits or Limits()), "arrays")
    while True:
        try:
            image = next(images)
        except StopIteration as end:
            return found, end.value
        assert isinstance(image, RawImage)
        found.append(image)


@pytest.mark.parametrize("as_folder", [False, True])
def test_images_and_labels_are_those_of_the_arrays(tmp_path: Path, as_folder: bool) -> None:
    arrays = good()
    path = saved(tmp_path, arrays)
    assert detect_format(local(tmp_path if as_folder else path)) == "arrays"
    images, names = read(tmp_path if as_folder else path)
    assert names == ("no", "yes")
    assert [image.split for image in images] == ["train"] * 7 + ["test"] * 2
    assert [image.label for image in images] == [*arrays["train/labels"].tolist(), -1, -1]
    np.testing.assert_array_equal(
        np.stack([image.pixels for image in images]), np.concatenate([arrays["train/images"], arrays["test/images"]])
    )
    assert images[3].member == "train/images[3]"


def test_more_than_one_piece_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.sources_npz.PIECE_BYTES", 2 * 30)
    arrays = good()
    images, _ = read(saved(tmp_path, arrays))
    np.testing.assert_array_equal(np.stack([image.pixels for image in images[:7]]), arrays["train/images"])


def test_what_the_repository_renders_is_such_a_file(tmp_path: Path) -> None:
    command = [sys.executable, "data/render_heads.py", str(tmp_path), "--train", "6", "--test", "3"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert detect_format(local(tmp_path)) == "arrays"
    images, names = read(tmp_path)
    assert [image.split for image in images] == ["train"] * 6 + ["test"] * 3
    assert {image.pixels.shape for image in images} == {(1, 32, 32)} and names == ("head",)
    with np.load(tmp_path / "heads.npz") as arrays:
        factors = np.concatenate([arrays["train/factors"], arrays["test/factors"]])
    np.testing.assert_array_equal(np.stack([image.columns["factors"] for image in images]), factors)


def test_columns_that_are_described_lie_beside_their_images(tmp_path: Path) -> None:
    arrays = with_columns()
    source = local(saved(tmp_path, arrays))
    images = list(read_images(source, "arrays"))
    assert source.columns == (Column("factors", ("a", "b", "c")), Column("balls", ("count",), "int32"))
    for name in ("factors", "balls"):
        np.testing.assert_array_equal(
            np.stack([image.columns[name] for image in images if isinstance(image, RawImage)]),
            np.concatenate([arrays[f"train/{name}"], arrays[f"test/{name}"]]),
        )


def changed(**arrays: object) -> Arrays:
    return {
        **good(),
        **{name.replace("about__json", "about.json").replace("__", "/"): value for name, value in arrays.items()},
    }  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (changed(train__images=np.zeros((7, 1, 6, 5))), "train/images: is an array of float64 in C order, uint8 in C"),
        (changed(train__images=np.asfortranarray(good()["train/images"])), "in Fortran order"),
        (changed(train__images=np.zeros((7, 2, 6, 5), np.uint8)), r"has shape \(7, 2, 6, 5\), images are"),
        (changed(train__images=np.zeros((0, 1, 6, 5), np.uint8)), "images are"),
        (changed(train__images=np.zeros((6, 1, 6, 5), np.uint8)), "has 6 images, train/labels has 7"),
        (changed(train__labels=np.array([0.0] * 7)), "labels are at most"),
        (changed(train__labels=np.array([0, 1, 2, 0, 0, 0, 0])), "item 2 is 2, about.json names 2 labels"),
        (changed(train__labels=np.array([0, -2, 0, 0, 0, 0, 0])), "item 1 is -2"),
        (changed(train__images=np.array([{"a": 1}], dtype=object)), "is an array of object"),
        ({name: array for name, array in good().items() if name != "about.json"}, "has no array about.json"),
        ({"about.json": np.frombuffer(b"[1]", np.uint8)}, 'is no JSON object with "labels"'),
        ({"about.json": np.frombuffer(b"\xff{", np.uint8)}, 'is no JSON object with "labels"'),
        ({"about.json": np.frombuffer(b'{"labels": [1]}', np.uint8)}, '"labels" are no list of names'),
        (changed(about__json=np.frombuffer(b'{"labels": [], "columns": 3}', np.uint8)), '"columns" do not give each'),
        (changed(about__json=about("no", "yes", factors="abc")), '"columns" do not give each column a list of names'),
        (changed(about__json=about("no", "yes", factors=["a", "b", "c"])), "no array test/factors"),
        (with_columns(about__json=about("no", "yes", factors=["a", "a", "c"])), "two entries .* are called 'a'"),
        (
            with_columns(about__json=about("no", "yes", factors=["a", "b"])),
            r"train/factors: has shape \(7, 3\), about.json names 2",
        ),
        (with_columns(about__json=about("no", "yes", images=["a"])), "cannot be called 'images'"),
        (with_columns(about__json=about("no", "yes", **{"../x": ["a"]})), "no array train/../x"),
        (with_columns(train__factors=np.zeros((7, 3))), "is of 'float64', columns are of float32, int32, uint8"),
        (with_columns(test__balls=np.zeros((2, 1), np.uint8)), "test/balls: is an array of uint8 .*, int32 in C order"),
        (with_columns(train__balls=np.zeros((6, 1), np.int32)), "has 7 images, train/balls has 6 rows"),
        (
            with_columns(train__factors=np.full((7, 3), np.nan, np.float32)),
            r"images\[0\]: 'a' of column 'factors' is nan",
        ),
        ({"about.json": about("a")}, "has no images that format 'arrays' would see"),
    ],
)
def test_other_arrays_are_refused_in_a_sentence(tmp_path: Path, arrays: Arrays, words: str) -> None:
    with pytest.raises(FigmentError, match=words):
        read(saved(tmp_path, arrays))


def member(shape: tuple[int, ...], data: bytes) -> bytes:
    """An array whose header may count more than its bytes."""
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return sink.getvalue() + data


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (member((2**40, 1, 6, 5), b"x" * 30), "its header counts .* more than its"),
        (member((1, 1, 2**20, 2**20), b""), "its header counts"),
        (member((1, 1, 2, 2), b"12345"), "goes on after the last"),
        (member((1, 1, -1, 8), b"x" * 80), "a number is below 0"),
        (member((2, 1, -8, -8), b"x" * 128), "a number is below 0"),
        (b"no array at all", "is no NumPy array"),
        (b"", "is no NumPy array"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': 1/0}  \n", "is no NumPy array"),
        (b"\x93NUMPY\x09\x00\x10\x00", "is an array of object|is no NumPy array"),
    ],
)
def test_a_lying_header_is_refused_before_memory_is_taken(tmp_path: Path, images: bytes, words: str) -> None:
    path = saved(tmp_path, {"about.json": about("a")})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/images.npy", images)
    with pytest.raises(FigmentError, match=words):
        read(path)


def test_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, {"about.json": about("a"), "train/images": np.zeros((400, 1, 60, 60), np.uint8)})
    with pytest.raises(FigmentError, match="--max-megapixels"):
        read(path, Limits(pixels=3_599))
    monkeypatch.setattr("pipelines.data.sources_npz.UNPACKED_FLOOR", 10**6)
    with pytest.raises(FigmentError, match="raise --max-ratio"):
        read(path, Limits(ratio=50))
    assert len(read(path, Limits(ratio=5_000))[0]) == 400


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    """A byte of the images' packed contents."""
    at = data.index(b"train/images.npy") + 300
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b"PK" + data[2:60], lambda data: b""])
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    arrays = {**good(), "train/images": np.random.default_rng(1).integers(0, 256, (7, 1, 60, 50), np.uint8)}
    path = saved(tmp_path, arrays)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FigmentError, match=r"made\.npz.*is no whole \.npz file"):
        read(path)


def test_a_folder_with_something_else_in_it_is_no_such_source(tmp_path: Path) -> None:
    saved(tmp_path, good())
    (tmp_path / "other.npz").write_bytes(b"")
    with pytest.raises(FigmentError, match=r"no folder with one \.npz file alone"):
        read(tmp_path)
