"""A square of the source's own pixels, cut from the middle before it is resized."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image
from pyarrow import fs as pafs

from pipelines.data import ingest_options
from pipelines.data.images import Bad, Row, prepare
from pipelines.data.ingest import ingest
from pipelines.data.ingest_options import IngestOptions, ingest_key, layout_of
from pipelines.data.manifest import load_manifest
from pipelines.data.sources_io import EncodedImage, RawImage, Source
from pipelines.errors import FigmentError
from tests.pipelines.data import archives
from tests.pipelines.data.archives import local, picture, random_images
from tests.pipelines.data.prepared import saved

FILE = EncodedImage("train", b"", 0, "")
RAW = RawImage("train", np.zeros((3, 32, 32), np.uint8), 0, "")


def cropped(data: bytes | np.ndarray, crop: int, size: int) -> np.ndarray | Bad:
    image = RawImage("train", data, 0, "m") if isinstance(data, np.ndarray) else EncodedImage("train", data, 0, "m")
    (item,) = prepare([image], size, "raw", crop=crop)
    return np.frombuffer(item.image, np.uint8).reshape(-1, size, size).astype(int) if isinstance(item, Row) else item


def by_pillow(picture: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    square = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square.convert("RGB")).transpose(2, 0, 1).astype(int)


def test_of_a_picture_of_celeba_the_108_pixels_in_the_middle_become_64() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (218, 178, 3), np.uint8))
    data = saved(noise, "JPEG", quality=95)
    wanted = by_pillow(Image.open(io.BytesIO(data)), (35, 55, 35 + 108, 55 + 108), 64)
    got = cropped(data, 108, 64)
    assert isinstance(got, np.ndarray) and np.abs(got - wanted).max() <= 1
    for shifted in ((34, 55, 142, 163), (35, 56, 143, 164)):
        assert np.abs(got - by_pillow(Image.open(io.BytesIO(data)), shifted, 64)).mean() > 5


@pytest.mark.parametrize("size", [24, 30, 64])
def test_pixels_are_cut_out_as_files_are(size: int) -> None:
    """Of 24 pixels cut from the middle: as they are, or made larger. Half a pixel goes to the right and below."""
    for channels in (1, 3):
        noise = np.random.default_rng(0).integers(0, 256, (channels, 31, 40), np.uint8)
        got, square = cropped(noise, 24, size), noise[:, 3:27, 8:32]
        planes = [Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC) for plane in square]
        assert isinstance(got, np.ndarray) and np.abs(got - np.stack(planes)).max() <= (0 if size == 24 else 2)
    as_file = cropped(saved(Image.fromarray(noise.transpose(1, 2, 0)), "PNG"), 24, size)
    assert np.array_equal(as_file, got)


def test_a_large_jpeg_is_not_reduced_before_its_square_is_cut() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8))
    data = saved(noise, "JPEG", quality=95)
    got = cropped(data, 32, 32)
    assert np.array_equal(got, by_pillow(Image.open(io.BytesIO(data)), (434, 334, 466, 366), 32))


def test_the_square_is_cut_from_the_upright_picture() -> None:
    canvas = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    got = cropped(saved(canvas, "PNG", exif=exif), 20, 20)
    assert np.array_equal(got, by_pillow(canvas.transpose(Image.Transpose.ROTATE_270), (10, 20, 30, 40), 20))


@pytest.mark.parametrize(("width", "height"), [(107, 218), (178, 107), (20, 20)])
def test_a_picture_without_room_for_it_is_bad_and_never_padded(width: int, height: int) -> None:
    words = f"its {width} x {height} pixels have no square of 108, which --crop wants"
    for data in (picture(0, width, height), np.zeros((3, height, width), np.uint8)):
        bad = cropped(data, 108, 64)
        assert isinstance(bad, Bad) and bad.reason == words
    assert not isinstance(cropped(picture(0, 108, 108), 108, 64), Bad)


# --- what it is by default, and what it changes -----------------------------------------------------------------------


def test_the_layout_says_what_is_cut() -> None:
    def of(name: str, first: EncodedImage | RawImage, **options: int) -> tuple[int | None, int | None]:
        layout = layout_of(name, first, IngestOptions("a", **options))  # type: ignore[arg-type]
        assert layout.image_shape[1:] == (layout.size or 32,) * 2
        return layout.crop, layout.size

    assert of("celeba", FILE) == (108, 64) == of("celeba", FILE, size=64) == of("celeba", FILE, crop=108)
    assert of("celeba", FILE, size=32) == (108, 32)
    assert of("celeba", FILE, crop=178, size=128) == (178, 128)
    assert of("folders", FILE) == (None, 64) and of("folders", FILE, crop=100) == (100, 64)
    assert of("svhn", RAW) == (None, None) == of("svhn", RAW, size=32)
    assert of("svhn", RAW, crop=24) == (24, 24) and of("svhn", RAW, crop=24, size=32) == (24, 32)
    with pytest.raises(FigmentError, match=r"a crop of 2,000 pixels is not stored as it is: say --size 8 … 1024"):
        of("svhn", RAW, crop=2000)
    for wrong in (0, -5, 7):
        with pytest.raises(FigmentError, match=f"crop must be at least 8 pixels, not {wrong}"):
            IngestOptions("a", crop=wrong)


def test_keys_without_a_crop_are_those_of_the_release_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL, "__version__", "1")
    monkeypatch.setattr(ingest_options, "version", lambda name: "1")
    source = Source(pafs.LocalFileSystem(), "/x", "x", identity="of its contents")

    def key(name: str, first: EncodedImage | RawImage, size: int | None, crop: int | None = None) -> str:
        options = IngestOptions("a", size=size, crop=crop)
        return ingest_key(source, options, layout_of(name, first, options))

    assert key("folders", FILE, 64) == "2fefeca0cca7581f6dac5263ae61edf25a1b73c6593284436167e3be648a3cd1"
    assert key("svhn", RAW, None) == "18d1ab6ec4509a55e227428c88afe78c29c47ea94e75a7d1cdacd57cbc1bcd24"
    assert key("svhn", RAW, 64) == "88e6fcf568ef10c5d4c97b6578a134e54bebf71f8b0461dbb1bede2129bddb07"
    crops = {key("folders", FILE, 64, crop) for crop in (None, 64, 108)}
    assert len(crops) == 3 and key("celeba", FILE, 64, 108) == key("celeba", FILE, None)


@pytest.mark.usefixtures("ray_cluster")
def test_an_ingest_cuts_tells_it_in_the_manifest_and_is_another_version(store: pafs.FileSystem, tmp_path: Path) -> None:
    images = random_images(20, seed=1)
    path = archives.cifar10_binary(tmp_path / "c.tar.gz", [images], images)
    options = IngestOptions("c", rows_per_shard=64)
    whole, cut = (ingest(local(path), store, replace(options, crop=crop)).manifest for crop in (None, 20))
    assert whole.version != cut.version and "crop" not in whole.source
    assert load_manifest(store, f"c@{cut.version}").source["crop"] == 20 and cut.image_shape == (3, 20, 20)
    with store.open_input_file(f"{cut.root}/{cut.shards('train')[0].path}") as file:
        rows = pq.read_table(file)["image"].to_pylist()
    assert sorted(rows) == sorted(image[:, 6:26, 6:26].tobytes() for image in images.pixels)
    assert ingest(local(path), store, replace(options, crop=20)).already_there
