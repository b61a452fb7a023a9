"""A source in, a data set version out: complete, deterministic, repeatable, or not there at all."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs as pafs

from pipelines.data import ingest as ingest_module
from pipelines.data import packing
from pipelines.data.images import Row, prepare
from pipelines.data.ingest import Progress, ingest
from pipelines.data.ingest_options import IngestOptions
from pipelines.data.manifest import Manifest, load_manifest
from pipelines.data.sources_io import EncodedImage
from pipelines.errors import FigmentError
from tests.pipelines.data import archives
from tests.pipelines.data.archives import CIFAR_NAMES, local, picture, random_images
from tests.pipelines.data.test_limits import png

TRAIN, TEST = random_images(257, seed=1), random_images(31, seed=2)
SMALL = IngestOptions("small", rows_per_shard=16, mix_shards=4)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    batches = [archives.Images(TRAIN.pixels[i : i + 26], TRAIN.labels[i : i + 26]) for i in range(0, 257, 26)]
    return archives.cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", batches, TEST)


def stored(fs: pafs.FileSystem, manifest: Manifest, split: str) -> list[tuple[bytes, int]]:
    """Every row of a split, after a check of everything that the manifest says of its shards."""
    rows = []
    for shard in manifest.shards(split):
        with fs.open_input_stream(f"{manifest.root}/{shard.path}") as stream:
            data = bytes(stream.read())
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        with fs.open_input_file(f"{manifest.root}/{shard.path}") as file:
            parquet = pq.ParquetFile(file)
            assert parquet.metadata.num_row_groups == 1
            table = parquet.read()
        images, labels = table["image"].to_pylist(), table["label"].to_numpy()
        assert len(table) == shard.rows and labels.dtype == np.int32
        content = hashlib.sha256(b"".join(images) + labels.astype("<i4").tobytes()).hexdigest()
        assert content == shard.content_sha256 and shard.path == f"shards/{content[:16]}.parquet"
        rows += list(zip(images, labels.tolist(), strict=True))
    return sorted(rows)


def files_of(fs: pafs.FileSystem) -> dict[str, tuple[int, int]]:
    found = fs.get_file_info(pafs.FileSelector("datasets", recursive=True, allow_not_found=True))
    return {info.path: (info.size, info.mtime_ns) for info in found if info.type == pafs.FileType.File}


def test_cifar10_becomes_the_same_rows(store: pafs.FileSystem, cifar: Path) -> None:
    result = ingest(local(cifar), store, SMALL)
    manifest = load_manifest(store, "small")
    assert manifest == result.manifest and result.path == f"{manifest.folder}/manifest.json"
    assert stored(store, manifest, "train") == TRAIN.rows()
    assert stored(store, manifest, "test") == TEST.rows()
    assert manifest.label_names == CIFAR_NAMES
    assert (manifest.image_shape, manifest.encoding) == ((3, 32, 32), "raw")
    assert manifest.channel_mean == pytest.approx(TRAIN.pixels.mean(axis=(0, 2, 3)), abs=1e-5)
    assert manifest.source["format"] == "cifar10-binary" and "Krizhevsky" in manifest.source["citation"]
    sizes = [shard.rows for shard in manifest.shards("train")]
    assert max(sizes) <= 16 and sum(sizes) == 257
    assert result.prepared == result.images == 288 and not result.already_there
    assert all(".ingest-" not in path for path in files_of(store))


def test_python_and_binary_layout_agree(store: pafs.FileSystem, tmp_path: Path, cifar: Path) -> None:
    other = archives.cifar10_python(tmp_path / "py.tar.gz", [TRAIN], TEST)
    one, two = ingest(local(cifar), store, SMALL), ingest(local(other), store, SMALL)
    assert one.manifest.version == two.manifest.version
    assert two.already_there


def test_the_same_source_and_options_give_the_same_bytes(tmp_path: Path, cifar: Path) -> None:
    found = []
    for name in ("one", "two"):
        fs = pafs.SubTreeFileSystem(str(tmp_path / name), pafs.LocalFileSystem())
        manifest = ingest(local(cifar), fs, SMALL).manifest
        found.append((manifest.version, manifest.splits))
    assert found[0] == found[1]


def test_small_sets_are_mixed_and_evenly_cut(store: pafs.FileSystem, tmp_path: Path) -> None:
    ordered = replace(TRAIN, labels=np.sort(TRAIN.labels))
    path = archives.cifar10_binary(tmp_path / "sorted.tar.gz", [ordered], TEST)
    manifest = ingest(local(path), store, IngestOptions("sorted", rows_per_shard=100)).manifest
    assert [shard.rows for shard in manifest.shards("train")] == [85, 86, 86]
    with store.open_input_file(f"{manifest.root}/{manifest.shards('train')[0].path}") as file:
        labels = pq.read_table(file)["label"].to_numpy()
    assert set(labels) == set(range(10))
    assert (np.diff(labels) == 0).mean() < 0.3


def test_repeating_writes_nothing(store: pafs.FileSystem, cifar: Path) -> None:
    first = ingest(local(cifar), store, SMALL)
    before = files_of(store)
    again = ingest(local(cifar), store, SMALL)
    assert again.already_there and again.images == 0 and again.manifest == first.manifest
    # Another source of the same content is read, found to be the same, and not written either.
    copy = cifar.with_name("copy.tar.gz")
    copy.write_bytes(cifar.read_bytes())
    third = ingest(local(copy), store, SMALL)
    assert third.already_there and third.images == 288 and third.manifest.version == first.manifest.version
    assert files_of(store) == before


def test_a_version_that_lost_a_shard_is_made_whole(store: pafs.FileSystem, cifar: Path) -> None:
    first = ingest(local(cifar), store, SMALL).manifest
    store.delete_file(f"{first.root}/{first.shards('train')[3].path}")
    again = ingest(local(cifar), store, SMALL)
    assert not again.already_there and again.manifest.version == first.version
    assert stored(store, load_manifest(store, "small"), "train") == TRAIN.rows()


def test_an_interrupted_run_is_taken_up(store: pafs.FileSystem, tmp_path: Path, cifar: Path) -> None:
    """The source breaks off in the middle, later the same file is whole: what was finished is not decoded again."""
    whole, stat = cifar.read_bytes(), cifar.stat()
    elsewhere = pafs.SubTreeFileSystem(str(tmp_path / "other"), pafs.LocalFileSystem())
    uninterrupted = ingest(local(cifar), elsewhere, SMALL).manifest

    def write(data: bytes) -> None:
        cifar.write_bytes(data)
        os.utime(cifar, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    write(whole[: len(whole) * 3 // 4] + bytes(len(whole) - len(whole) * 3 // 4))
    with pytest.raises(FigmentError, match="byte"):
        ingest(local(cifar), store, SMALL)
    with pytest.raises(FigmentError, match="no complete data set"):
        load_manifest(store, "small")
    finished = [path for path in files_of(store) if "/.ingest-" in path]
    assert finished

    write(whole)
    result = ingest(local(cifar), store, SMALL)
    assert result.images - result.prepared == 16 * len(finished)
    assert result.manifest.version == uninterrupted.version
    assert result.manifest.splits == uninterrupted.splits
    assert result.manifest.channel_mean == uninterrupted.channel_mean
    assert not [path for path in files_of(store) if "/.ingest-" in path]
    # Other options are another ingest: nothing of this one is taken for theirs.
    assert ingest(local(cifar), store, replace(SMALL, rows_per_shard=20)).prepared == 288


class KilledError(Exception):
    pass


def kill(*_: object) -> None:
    raise KilledError


def test_another_ingest_ends_while_this_one_takes_up_its_journal(
    store: pafs.FileSystem, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found the journal of a run that was killed; the other one deletes it while this one reads it."""
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(ingest_module, "save_manifest", kill)
        ingest(local(cifar), store, SMALL)
    assert [path for path in files_of(store) if "/.ingest-" in path]
    real, others = packing.read_json, []

    def read_json(fs: pafs.FileSystem, path: str) -> object:
        if not others:
            others.append("begun")
            others[0] = ingest(local(cifar), store, SMALL).manifest
        return real(fs, path)

    monkeypatch.setattr(packing, "read_json", read_json)
    mine = ingest(local(cifar), store, SMALL).manifest
    assert mine == others[0] == load_manifest(store, "small")
    assert stored(store, mine, "train") == TRAIN.rows()
    assert not [path for path in files_of(store) if "/.ingest-" in path]


def test_a_journal_that_was_left_beside_a_finished_version_goes(
    store: pafs.FileSystem, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(packing.Journal, "delete", kill)
        ingest(local(cifar), store, SMALL)
    assert [path for path in files_of(store) if "/.ingest-" in path]
    assert ingest(local(cifar), store, SMALL).already_there
    assert not [path for path in files_of(store) if "/.ingest-" in path]


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_nothing_is_visible_of_a_source_that_is_cut_off(store: pafs.FileSystem, cifar: Path, share: float) -> None:
    data = cifar.read_bytes()
    cifar.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FigmentError, match=r"cifar-10-binary.tar.gz.*byte"):
        ingest(local(cifar), store, SMALL)
    assert not [path for path in files_of(store) if path.endswith("manifest.json")]


def test_an_edited_manifest_is_mended_by_ingesting_again(store: pafs.FileSystem, cifar: Path) -> None:
    path = ingest(local(cifar), store, SMALL).path
    with store.open_input_stream(path) as stream:
        body = bytes(stream.read())
    with store.open_output_stream(path) as stream:
        stream.write(body.replace(b'"airplane"', b'"aeroplane"'))
    with pytest.raises(FigmentError, match="edited"):
        load_manifest(store, "small")
    ingest(local(cifar), store, SMALL)
    assert load_manifest(store, "small").label_names == CIFAR_NAMES


def test_idx_of_two_sizes_wants_a_size(store: pafs.FileSystem, tmp_path: Path) -> None:
    train, test = random_images(9, (1, 28, 28)), random_images(5, (1, 16, 16))
    source = archives.idx(tmp_path / "mnist", train, test)
    with pytest.raises(FigmentError, match=r"t10k-images.*\(1, 16, 16\).*\(1, 28, 28\).*--size"):
        ingest(local(source), store, SMALL)
    assert not files_of(store)


def test_idx_is_stored_raw_with_one_channel(store: pafs.FileSystem, tmp_path: Path) -> None:
    train, test = random_images(90, (1, 28, 28)), random_images(20, (1, 28, 28))
    manifest = ingest(local(archives.idx(tmp_path / "mnist", train, test)), store, SMALL).manifest
    assert stored(store, manifest, "train") == train.rows() and stored(store, manifest, "test") == test.rows()
    assert (manifest.image_shape, len(manifest.channel_mean)) == ((1, 28, 28), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "../x"}, "data set name"),
        ({"size": 4}, "size 4"),
        ({"size": 5000}, "size 5000"),
        ({"rows_per_shard": 0}, "rows per shard"),
        ({"mix_shards": 0}, "mix shards"),
        ({"encoding": "gif"}, "gif"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FigmentError, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]


# --- images that are decoded on Ray workers ---------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    files = {f"n{i:08d}": [picture(100 * i + k) for k in range(40)] for i in range(5)}
    return archives.imagenet_train(tmp_path / "ILSVRC2012_img_train.tar", files)


@pytest.mark.usefixtures("ray_cluster")
def test_imagenet_is_decoded_on_workers(store: pafs.FileSystem, imagenet: Path) -> None:
    result = ingest(local(imagenet), store, replace(SMALL, dataset_name="imagenet", size=32))
    manifest = result.manifest
    assert (manifest.image_shape, manifest.encoding) == ((3, 32, 32), "raw")
    assert manifest.label_names == tuple(f"n{i:08d}" for i in range(5))
    wanted = [
        (row.image, label)
        for label in range(5)
        for k in range(40)
        for row in prepare([EncodedImage("train", picture(100 * label + k), label, "")], 32, "raw")
        if isinstance(row, Row)
    ]
    got = stored(store, manifest, "train")
    assert got == sorted(wanted)
    mean = np.mean([np.frombuffer(image, np.uint8).reshape(3, -1).mean(axis=1) for image, _ in got], axis=0)
    assert manifest.channel_mean == pytest.approx(mean, abs=1e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_large_images_are_stored_as_lossless_webp(store: pafs.FileSystem, imagenet: Path) -> None:
    manifest = ingest(local(imagenet), store, replace(SMALL, size=96)).manifest
    assert (manifest.image_shape, manifest.encoding) == ((3, 96, 96), "webp")
    image, _ = stored(store, manifest, "train")[0]
    assert Image.open(io.BytesIO(image)).size == (96, 96)


@pytest.mark.usefixtures("ray_cluster")
def test_folders_are_read_by_the_workers(store: pafs.FileSystem, tmp_path: Path) -> None:
    names = [f"{split}/{label}/{i}.png" for split in ("train", "test") for label in "ab" for i in range(9)]
    root = archives.tree(tmp_path / "t", {name: picture(i, form="PNG") for i, name in enumerate(names)})
    manifest = ingest(local(root), store, SMALL).manifest
    assert (manifest.rows("train"), manifest.rows("test"), manifest.label_names) == (18, 18, ("a", "b"))
    assert manifest.image_shape == (3, 64, 64)
    assert sorted(label for _, label in stored(store, manifest, "test")) == [0] * 9 + [1] * 9


@pytest.mark.usefixtures("ray_cluster")
def test_bad_images_stop_the_ingest_or_are_counted(store: pafs.FileSystem, tmp_path: Path) -> None:
    torn = picture(0)[:400]
    files = {f"n{i:08d}": [torn if k % 10 == i else picture(100 * i + k) for k in range(40)] for i in range(5)}
    path = archives.imagenet_train(tmp_path / "train.tar", files)
    with pytest.raises(FigmentError, match=r"train.tar, n00000000.tar/n00000000_0.JPEG \(byte .*--on-bad-image skip"):
        ingest(local(path), store, SMALL)
    assert not [name for name in files_of(store) if name.endswith("manifest.json")]
    manifest = ingest(local(path), store, replace(SMALL, on_bad_image="skip", size=32)).manifest
    assert manifest.rows("train") == len(stored(store, manifest, "train")) == 180
    assert manifest.skipped.count == len(manifest.skipped.members) == 20
    assert all(".JPEG (byte " in member and "truncated" in member.lower() for member in manifest.skipped.members)
    assert load_manifest(store, "small") == manifest


@pytest.mark.usefixtures("ray_cluster")
def test_eps_and_bombs_are_skipped_and_counted(store: pafs.FileSystem, tmp_path: Path) -> None:
    files = {f"a/{i}.jpg": picture(i) for i in range(6)}
    files |= {"a/eps.jpg": picture(9, form="EPS"), "a/bomb.png": png(13_300)}
    root = archives.tree(tmp_path / "t", files)
    with pytest.raises(FigmentError, match=r"a/bomb.png: not a readable image .*13,300 x 13,300.*--on-bad-image skip"):
        ingest(local(root), store, SMALL)
    manifest = ingest(local(root), store, replace(SMALL, on_bad_image="skip")).manifest
    assert (manifest.rows("train"), manifest.skipped.count) == (6, 2)
    assert {member.partition(":")[0] for member in manifest.skipped.members} == {"a/eps.jpg", "a/bomb.png"}


@pytest.mark.usefixtures("ray_cluster")
def test_only_bad_images_make_no_data_set(store: pafs.FileSystem, tmp_path: Path) -> None:
    root = archives.tree(tmp_path / "t", {f"a/{i}.jpg": b"nothing" for i in range(50)})
    with pytest.raises(FigmentError, match="not one of its 50 images"):
        ingest(local(root), store, replace(SMALL, on_bad_image="skip"))
    assert not [name for name in files_of(store) if name.endswith("manifest.json")]


def test_workers_are_asked_for_only_when_there_is_something_to_decode(store: pafs.FileSystem, cifar: Path) -> None:
    calls: list[int] = []
    ingest(local(cifar), store, SMALL, connect=lambda: calls.append(1))
    assert not calls


def test_progress_ends_at_the_end(store: pafs.FileSystem, cifar: Path) -> None:
    seen: list[Progress] = []
    result = ingest(local(cifar), store, SMALL, on_progress=seen.append)
    shards = [shard for found in result.manifest.splits.values() for shard in found]
    assert (seen[-1].images, seen[-1].shards, seen[-1].skipped) == (288, len(shards), 0)
    assert seen[-1].bytes_read == seen[-1].bytes_total == cifar.stat().st_size
