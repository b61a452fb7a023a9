"""How many bytes the driver of an ingest holds: by arithmetic for every size, and counted in real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs as pafs

from pipelines.data import ingest_options
from pipelines.data.ingest import ingest
from pipelines.data.ingest_options import HELD_BYTES, IngestOptions, Layout, plan_layout
from pipelines.errors import FigmentError
from tests.pipelines.data import archives
from tests.pipelines.data.archives import local, picture, random_images


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return archives.tree(tmp_path / "photographs", {"a/1.png": picture(0, form="PNG")})


def layout(path: Path, options: IngestOptions) -> Layout:
    planned, images = plan_layout(local(path), options)
    images.close()
    return planned


@pytest.mark.parametrize("encoding", ["auto", "raw", "png", "jpeg", "webp"])
@pytest.mark.parametrize("size", [8, 32, 64, 65, 128, 256, 512, 1024])
def test_no_size_and_encoding_holds_more(photographs: Path, size: int, encoding: str) -> None:
    for mix in (1, 64, 5000):
        planned = layout(photographs, IngestOptions("a", size=size, encoding=encoding, mix_shards=mix))  # type: ignore[arg-type]
        assert planned.held_bytes <= HELD_BYTES and 1 <= planned.open_shards <= mix
        images = planned.open_shards * planned.rows_per_shard
        assert mix == 1 or images >= 100  # enough to mix


def test_today_s_sizes_are_laid_out_as_they_were(tmp_path: Path, photographs: Path) -> None:
    mnist = archives.idx(tmp_path / "mnist", random_images(3, (1, 28, 28)), random_images(3, (1, 28, 28)))
    for path, size, rows in ((mnist, None, 4096), (photographs, 32, 2730), (photographs, 64, 682)):
        planned = layout(path, IngestOptions("a", size=size))
        assert (planned.rows_per_shard, planned.open_shards, planned.encoding) == (rows, 64, "raw")


def test_shards_that_cannot_be_held_are_refused(photographs: Path) -> None:
    with pytest.raises(FigmentError, match="--rows-per-shard can be 46 at most"):
        layout(photographs, IngestOptions("a", size=1024, rows_per_shard=4096))
    assert layout(photographs, IngestOptions("a", size=1024, rows_per_shard=46)).open_shards == 1


def test_a_run_holds_what_was_planned(store: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_options, "HELD_BYTES", 600_000)
    train, test = random_images(600), random_images(10)
    path = archives.cifar10_binary(tmp_path / "cifar.tar.gz", [train], test)
    result = ingest(local(path), store, IngestOptions("a", rows_per_shard=16))
    assert layout(path, IngestOptions("a", rows_per_shard=16)).open_shards == 9
    assert 300_000 < result.most_held <= 600_000
    assert result.manifest.rows("train") == 600


def test_one_split_is_let_go_before_the_next(
    store: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two splits, each of which leaves its open shards nearly full."""
    monkeypatch.setattr(ingest_options, "HELD_BYTES", 600_000)
    images = random_images(45, (1, 64, 64))  # of 9 open shards of 12 images not one gets full
    result = ingest(local(archives.idx(tmp_path / "idx", images, images)), store, IngestOptions("a", rows_per_shard=12))
    assert result.manifest.rows("train") == result.manifest.rows("test") == 45
    assert result.most_held <= 45 * 64 * 64


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_of_large_images_holds_what_was_planned(
    store: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of 512 x 512 pixels, which no encoding makes smaller."""
    monkeypatch.setattr(ingest_options, "HELD_BYTES", 12_000_000)
    path = archives.idx(tmp_path / "noise", random_images(90, (1, 512, 512)), random_images(2, (1, 512, 512)))
    result = ingest(local(path), store, IngestOptions("a", rows_per_shard=4))
    assert result.manifest.encoding == "webp" and result.manifest.rows("train") == 90
    assert 5_000_000 < result.most_held <= 12_000_000
