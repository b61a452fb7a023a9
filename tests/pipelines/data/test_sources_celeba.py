"""CelebA's three files as they are, and every way in which one can be wrong or not belong to the others."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import fs as pafs

from pipelines.data import sources_celeba
from pipelines.data.columns import Column
from pipelines.data.ingest import ingest
from pipelines.data.ingest_options import IngestOptions
from pipelines.data.manifest import load_manifest
from pipelines.data.sources import detect_format, fingerprint, read_images
from pipelines.data.sources_io import EncodedImage, Source, SourceImage
from pipelines.data.stream import evaluation_batches
from pipelines.errors import FigmentError
from pipelines.objects import write_object
from tests.pipelines.data import archives
from tests.pipelines.data.archives import CELEBA_NAMES, local, picture, zip_of
from tests.pipelines.data.prepared import saved

ZIP, ATTRIBUTES, PARTITION = "img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"
N = 7
PARTS = (0, 2, 0, 1, 0, 1, 2)
HAS = np.random.default_rng(0).integers(0, 2, (N, 40), np.uint8)
FILES = [picture(i, 30, 40) for i in range(N)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return archives.celeba(tmp_path / "celeba", FILES, HAS, PARTS)


def read(source: Source) -> list[SourceImage]:
    return list(read_images(source, "celeba"))


def refused(source: Source, *parts: str) -> None:
    with pytest.raises(FigmentError) as error:
        read(source)
    message = str(error.value)
    for part in (source.name, *parts):
        assert part in message, message
    assert "\n" not in message


def members() -> dict[str, bytes]:
    return {f"img_align_celeba/{i:06d}.jpg": data for i, data in enumerate(FILES, 1)}


def test_the_splits_in_turn_with_what_is_in_each_picture(folder: Path) -> None:
    (folder / "identity_CelebA.txt").write_text("not read")
    for way in (folder, folder / ZIP, folder / ATTRIBUTES, folder / PARTITION):
        source = local(way)
        assert detect_format(source) == "celeba"
        images = read_images(source, "celeba")
        found = [next(images) for _ in range(N)]
        with pytest.raises(StopIteration) as end:
            next(images)
        assert end.value.value == () and source.columns == (Column("attributes", CELEBA_NAMES, "uint8"),)
        order = [i for part in (0, 1, 2) for i in range(N) if PARTS[i] == part]
        for image, i in zip(found, order, strict=True):
            assert isinstance(image, EncodedImage) and image.data == FILES[i] and image.label == -1
            assert image.split == ("train", "val", "test")[PARTS[i]]
            assert np.array_equal(image.columns["attributes"], HAS[i])
            assert image.member.startswith(f"{ZIP}, img_align_celeba/{i + 1:06d}.jpg (byte ")
    own = local(folder, own=frozenset({ZIP, ATTRIBUTES}))
    refused(own, f"has no {PARTITION}")


def test_the_order_is_that_of_the_zip_whatever_its_directory_and_the_lists_have(folder: Path) -> None:
    zip_of(folder / ZIP, dict(reversed(list(members().items()))))
    assert [image.data for image in read(local(folder)) if image.split == "train"] == [FILES[i] for i in (4, 2, 0)]  # type: ignore[union-attr]
    data = bytearray((folder / ZIP).read_bytes())
    with zipfile.ZipFile(folder / ZIP) as archive:
        start, ends = archive.start_dir, archive.infolist()
    entry = 46 + len(ends[-1].filename)
    last = data.rindex(b"PK\1\2")
    moved = data[:start] + data[last : last + entry] + data[start:last] + data[last + entry :]
    assert len(moved) == len(data) and moved != data
    (folder / ZIP).write_bytes(moved)
    assert [image.data for image in read(local(folder)) if image.split == "train"] == [FILES[i] for i in (4, 2, 0)]  # type: ignore[union-attr]


def test_the_fingerprint_is_that_of_the_three_files(folder: Path) -> None:
    seen = {fingerprint(local(folder))}
    (folder / "identity_CelebA.txt").write_text("not read")
    assert fingerprint(local(folder)) in seen
    for name in (ZIP, ATTRIBUTES, PARTITION):
        with (folder / name).open("ab") as file:
            file.write(b" ")
        seen.add(fingerprint(local(folder)))
    assert len(seen) == 4


def test_other_blanks_line_ends_and_entries_are_taken(folder: Path) -> None:
    wanted = read(local(folder))
    for name in (ATTRIBUTES, PARTITION):
        text = (folder / name).read_text()
        spaced = "\r\n".join(line.replace(" ", " \t ") + "  " for line in text.split("\n")) + "\r\n \r\n"
        (folder / name).write_bytes(b"\xef\xbb\xbf" + spaced.encode())
    extra = {"__MACOSX/img_align_celeba/._000001.jpg": b"x", "img_align_celeba/.DS_Store": b"x", "readme.txt": b"x"}
    zip_of(folder / ZIP, extra | {name.replace("img_", "a/img_"): data for name, data in members().items()})
    found = read(local(folder))
    assert [image.data for image in found] == [image.data for image in wanted]  # type: ignore[union-attr]
    assert all(
        np.array_equal(a.columns["attributes"], b.columns["attributes"]) for a, b in zip(found, wanted, strict=True)
    )  # type: ignore[union-attr]


@pytest.mark.parametrize("missing", [ZIP, ATTRIBUTES, PARTITION])
def test_a_file_that_is_not_there_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    refused(local(folder), f"has no {missing}", "must lie in one folder", "the zip not unpacked")
    assert (detect_format(local(folder)) == "celeba") == (missing != ZIP)


def lines_of(name: str, change: Callable[[list[str]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        lines = (folder / name).read_text().split("\n")
        change(lines)
        (folder / name).write_text("\n".join(lines))

    return damage


def put(i: int, line: str) -> Callable[[list[str]], object]:
    return lambda lines: lines.__setitem__(i, line)


VALUES = " 1" * 40
A, P = ATTRIBUTES, PARTITION


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (A, lambda lines: lines.clear(), [f"{A}: begins with '', not with a line that says how many"]),
        (A, lambda lines: lines.pop(0), [f"{A}: begins with 'Attribute_0 Attribute_1"]),
        (A, put(0, "8"), [f"{A}: has 7 rows, its first line counts 8: cut off"]),
        (A, put(0, "6"), [f"{A}, line 9: is a row too many, the first line counts 6"]),
        (A, put(0, "-7"), ["begins with '-7'"]),
        (A, put(0, "9" * 30), ["begins with '999"]),
        (A, put(0, "\u0667"), ["begins with"]),
        (A, lambda lines: lines.pop(1), [f"{A}, line 2: names 41 attributes, CelebA has 40"]),
        (A, put(1, " ".join(CELEBA_NAMES[:39])), [f"{A}, line 2: names 39 attributes"]),
        (A, put(1, " ".join([*CELEBA_NAMES[:39], "Attribute_3"])), ["two entries", "called 'Attribute_3'"]),
        (A, put(1, " ".join([*CELEBA_NAMES[:39], "x" * 200])), ["names no attributes as they can be kept"]),
        (A, put(4, f"000003.jpg{VALUES[2:]}"), [f"{A}, line 5: has 39 attributes, 40 are named in line 2"]),
        (A, put(4, f"000003.jpg{VALUES} 1"), [f"{A}, line 5: has 41 attributes"]),
        (A, put(4, f"000003.jpg{VALUES[2:]} 0"), [f"{A}, line 5: has the attribute '0', they are 1 or -1"]),
        (A, put(4, f"000003.jpg{VALUES[2:]} 1.0"), ["has the attribute '1.0'"]),
        (A, put(4, f"000002.jpg{VALUES}"), [f"{A}, line 5: is the second row of 000002.jpg"]),
        (A, put(4, f"../003.jpg{VALUES}"), [f"{A}, line 5: begins with '../003.jpg', which is no name like"]),
        (A, put(4, f"3{VALUES}"), ["begins with '3', which is no name like 000001.jpg"]),
        (A, put(4, f"000009.jpg{VALUES}"), [f"{P}, line 3: has a row of 000003.jpg, {A} has none"]),
        (A, put(4, "x" * 5000), [f"{A}, line 5: is longer than the 4,096 bytes"]),
        (P, lambda lines: lines.clear(), [f"{P}: has no row of 000001.jpg, {A} has one, and 6 more"]),
        (P, lambda lines: lines.pop(6), [f"{P}: has no row of 000007.jpg, {A} has one, and 0 more"]),
        (P, put(3, "000004.jpg 3"), [f"{P}, line 4: gives 000004.jpg the part '3', it is 0 (train), 1"]),
        (P, put(3, "000004.jpg"), [f"{P}, line 4: gives 000004.jpg the part ''"]),
        (P, put(3, "000004.jpg 1 1"), ["the part '1 1'"]),
        (P, put(3, "000003.jpg 0"), [f"{P}, line 4: is the second row of 000003.jpg"]),
        (P, put(3, "000008.jpg 0"), [f"{P}, line 4: has a row of 000008.jpg, {A} has none"]),
        (P, put(3, "a" * 9000), [f"{P}, line 4: is longer than"]),
        (P, put(3, "<html> 1"), [f"{P}, line 4: begins with '<html>'"]),
    ],
)
def test_lists_that_are_wrong(folder: Path, name: str, change: Callable[[list[str]], object], words: list[str]) -> None:
    lines_of(name, change)(folder)
    refused(local(folder), *words)


def test_lists_that_are_cut_off_anywhere_are_refused(folder: Path) -> None:
    for name in (ATTRIBUTES, PARTITION):
        data = (folder / name).read_bytes()
        for cut in range(0, len(data) - 2, 5 if name == PARTITION else 41):
            (folder / name).write_bytes(data[:cut])
            refused(local(folder), name)
        (folder / name).write_bytes(data)
    (folder / ATTRIBUTES).write_bytes(np.random.default_rng(0).bytes(100_000))
    refused(local(folder), ATTRIBUTES)


def test_a_list_without_end_is_read_within_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one line, of blank lines, of rows that go on: 30 MB each."""
    monkeypatch.setattr(sources_celeba, "TEXT_BYTES", 50_000)
    whole = (folder / ATTRIBUTES).read_bytes()
    tracemalloc.start()
    try:
        for data, words in (
            (b"x" * 30_000_000, "line 1: is longer than the 4,096 bytes"),
            (whole + b"\n" * 30_000_000, "stands beyond the 0.05 MB that a list of CelebA may have"),
            (whole + b"000008.jpg 1\n" * 2_000_000, "line 10: is a row too many"),
        ):
            (folder / ATTRIBUTES).write_bytes(data)
            data = b""
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            refused(local(folder), ATTRIBUTES, words)
            assert tracemalloc.get_traced_memory()[1] - before < 20e6, "a buffer of 8 MB of the file among it"
    finally:
        tracemalloc.stop()


# --- from the three files to batches ----------------------------------------------------------------------------------


def coloured(number: int, width: int = 178, height: int = 218) -> bytes:
    """Its colour tells which one it is; around the middle 108 x 108 it is white."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[height // 2 - 56 : height // 2 + 56, width // 2 - 56 : width // 2 + 56] = (number * 4, 128, 90)
    return saved(Image.fromarray(canvas), "JPEG", quality=95)


@pytest.mark.usefixtures("ray_cluster")
def test_from_s3_every_row_of_a_batch_has_the_attributes_of_its_picture(
    s3_store: tuple[str, pafs.FileSystem], tmp_path: Path
) -> None:
    """Picture i is of colour 4 i, and its first six attributes are i in binary; two of them cannot be used."""
    _, fs = s3_store
    files = [coloured(i) for i in range(60)]
    files[7], files[11] = coloured(7, 178, 90), files[11][:900]
    has = np.zeros((60, 40), np.uint8)
    has[:, :6] = np.arange(60)[:, None] >> np.arange(6) & 1
    parts = [0 if i < 40 else 1 if i < 52 else 2 for i in range(60)]
    for path in archives.celeba(tmp_path / "celeba", files, has, parts).iterdir():
        write_object(fs, f"archives/{path.name}", path.read_bytes())
    source = Source(fs, "archives", "s3://…/archives")
    options = IngestOptions("celeba64", rows_per_shard=16, mix_shards=2)
    with pytest.raises(
        FigmentError, match=r"img_align_celeba/000008.jpg .*178 x 90 pixels have no square of 108.*skip"
    ):
        ingest(source, fs, options)
    assert ingest(replace(source), fs, replace(options, on_bad_image="skip")).images == 60
    manifest = load_manifest(fs, "celeba64")
    assert {split: manifest.rows(split) for split in manifest.splits} == {"train": 38, "val": 12, "test": 8}
    assert manifest.image_shape == (3, 64, 64) and manifest.encoding == "raw" and manifest.label_names == ()
    assert manifest.source["crop"] == 108 and manifest.source["format"] == "celeba"
    assert "Liu" in manifest.source["citation"] and manifest.skipped.count == 2
    seen: list[int] = []
    for split in manifest.splits:
        with evaluation_batches(fs, manifest, split, world_size=1, rank=0, batch_size=5) as batches:
            for images, labels, columns in batches:
                assert (labels == -1).all() and columns["attributes"].shape == (len(labels), 40)
                colours = images.mean(axis=(2, 3))
                numbers = np.rint(colours[:, 0] / 4).astype(int)
                assert np.abs(colours - np.stack([numbers * 4, *np.full((2, len(labels)), [[128], [90]])], 1)).max() < 2
                assert (images.std(axis=(2, 3)) < 2).all(), "nothing of what lies around the square"
                assert np.array_equal(columns["attributes"], has[numbers])
                seen += numbers.tolist()
    assert sorted(seen) == [i for i in range(60) if i not in (7, 11)]
