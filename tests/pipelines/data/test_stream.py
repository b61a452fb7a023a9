"""The stream on a real Ray cluster and a real S3 server gives exactly what the plan says, or names what is wrong."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow import fs as pafs

from pipelines.data import stream
from pipelines.data.manifest import Manifest
from pipelines.data.plan import Cursor, rank_segments, training_plan, window_order
from pipelines.data.stream import BatchStream, evaluation_batches, training_batches
from pipelines.data.windows import Layout, Read
from pipelines.errors import FigmentError
from pipelines.objects import read_object, write_object
from pipelines.ray_private import object_store_bytes, session_folder
from tests.pipelines.data.shards import image_of, write_dataset

SHARD_ROWS = (17, 0, 30, 5, 23, 40, 8)
N = sum(SHARD_ROWS)
Store = tuple[str, pafs.FileSystem]

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def short_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pipelines an epoch and several blocks a window, so that a small data set crosses all seams."""
    monkeypatch.setattr(stream, "WINDOWS_PER_PIPELINE", 3)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 200)


def train(
    fs: pafs.FileSystem,
    manifest: Manifest,
    cursor: Cursor,
    rank: int = 0,
    batch_size: int = 16,
    batches: int | None = None,
) -> BatchStream:
    return training_batches(
        fs,
        manifest,
        "train",
        seed=5,
        shuffle_shards=3,
        cursor=cursor,
        rank=rank,
        batch_size=batch_size,
        batches=batches,
    )


def expected_rows(manifest: Manifest, cursor: Cursor, rank: int) -> Iterator[tuple[int, int]]:
    """(epoch, row in stored order) of what the rank still has to read, put together naively."""
    plan = training_plan(manifest, "train", seed=5, shuffle_shards=3)
    first = np.cumsum([0, *plan.shard_rows])
    for epoch, start, stop in rank_segments(plan, cursor, rank):
        order: list[int] = []
        for window in plan.windows(epoch):
            rows = np.concatenate([np.arange(first[s], first[s + 1]) for s in window.shards])
            order += rows[window_order(5, epoch, window)].tolist()
        yield from ((epoch, row) for row in order[start:stop])


def threads() -> list[str]:
    return [
        t.name for t in threading.enumerate() if t.name.startswith(("figment-data", "StreamingExecutor", "Prefetch"))
    ]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.usefixtures("short_pipelines")
def test_batches_are_the_plan_on_two_workers_at_once(s3_store: Store) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", SHARD_ROWS, shape=(3, 4, 5))
    cursor = Cursor.start(2)
    seen: Counter[tuple[int, int]] = Counter()
    with train(fs, manifest, cursor, 0) as one, train(fs, manifest, cursor, 1) as two:
        wanted = [expected_rows(manifest, cursor, rank) for rank in (0, 1)]
        for _ in range(16):  # 16 batches of 16 rows on 2 workers: four epochs of 123 rows, and 20 rows of the fifth
            for batches, rows in zip((one, two), wanted, strict=True):
                images, labels, _ = next(batches)
                now = list(islice(rows, 16))
                assert images.dtype == np.uint8
                assert labels.dtype == np.int64
                assert labels.tolist() == [row for _, row in now]
                np.testing.assert_array_equal(images, np.stack([image_of(row, (3, 4, 5)) for _, row in now]))
                assert images.flags.c_contiguous
                assert images.flags.writeable
                seen.update(now)
        assert one.stall_seconds > 0
    assert {row: n for row, n in seen.items() if row[0] < 4} == {(e, row): 1 for e in range(4) for row in range(N)}


@pytest.mark.usefixtures("short_pipelines")
def test_resuming_in_the_middle_of_an_epoch_is_the_same_stream(s3_store: Store) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", SHARD_ROWS)
    cursor = Cursor.start(2)
    with train(fs, manifest, cursor, 1) as whole:
        straight = [next(whole) for _ in range(9)]
    later = Cursor.from_dict(cursor.advance(4 * 16).to_dict())
    with train(fs, manifest, later, 1) as rest:
        for images, labels, _ in straight[4:]:
            again_images, again_labels, _ = next(rest)
            np.testing.assert_array_equal(again_images, images)
            np.testing.assert_array_equal(again_labels, labels)


def test_resuming_on_more_workers_shows_the_rest_of_the_epoch_once(s3_store: Store) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", SHARD_ROWS)
    plan = training_plan(manifest, "train", seed=5, shuffle_shards=3)
    seen: Counter[int] = Counter()
    for rank in range(2):
        with train(fs, manifest, Cursor.start(2), rank, batch_size=7) as batches:
            for _ in range(3):
                seen.update(next(batches)[1].tolist())
    cursor = Cursor.start(2).advance(21).resize(plan, 3)
    assert sum(stop - start for _, start, stop in cursor.pending) == N - 42 == 81
    for rank in range(3):
        with train(fs, manifest, cursor, rank, batch_size=27) as batches:
            seen.update(next(batches)[1].tolist())
    assert seen == Counter(range(N))


@pytest.mark.parametrize("shape", [(3, 12, 9), (1, 12, 9)], ids=["colour", "gray"])
def test_encoded_images_are_decoded(s3_store: Store, shape: tuple[int, int, int]) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "pngs", (12, 7, 15), shape=shape, encoding="png")
    cursor = Cursor.start(1)
    with train(fs, manifest, cursor, batch_size=20) as batches:
        rows = expected_rows(manifest, cursor, 0)
        for _ in range(4):
            images, labels, _ = next(batches)
            now = [row for _, row in islice(rows, 20)]
            assert labels.tolist() == now
            np.testing.assert_array_equal(images, np.stack([image_of(row, shape) for row in now]))


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_evaluation_is_one_pass_in_stored_order(s3_store: Store, encoding: str) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", (10, 1, 0, 12), split="test", encoding=encoding)
    read: list[int] = []
    for rank in range(3):
        with evaluation_batches(fs, manifest, "test", world_size=3, rank=rank, batch_size=5) as batches:
            got = [(images, labels.tolist()) for images, labels, _ in batches]
            assert list(batches) == []
        assert [len(labels) for _, labels in got] == [[5, 2], [5, 3], [5, 3]][rank]
        for images, labels in got:
            np.testing.assert_array_equal(images, np.stack([image_of(row, (1, 4, 4)) for row in labels]))
            read += labels
    assert read == list(range(23))


def test_a_share_of_an_evaluation_may_be_empty(s3_store: Store) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", (2,), split="test")
    sizes = []
    for rank in range(3):
        with evaluation_batches(fs, manifest, "test", world_size=3, rank=rank, batch_size=5) as batches:
            sizes.append([len(labels) for _, labels, _ in batches])
    assert sorted(sizes) == [[], [1], [1]]


def flip(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip, "is damaged: its sha256"), (lambda data: data[:-10], "bytes, its manifest says"), (None, "is missing")],
    ids=["flipped byte", "cut off", "missing"],
)
def test_a_bad_shard_is_named(s3_store: Store, damage: Callable[[bytes], bytes] | None, words: str) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", (40, 40, 40, 40))
    path = f"{manifest.root}/{manifest.shards('train')[2].path}"
    if damage is None:
        fs.delete_file(path)
    else:
        write_object(fs, path, damage(read_object(fs, path)))
    with train(fs, manifest, Cursor.start(1)) as batches, pytest.raises(FigmentError) as caught:
        for _ in range(11):
            next(batches)
    message = str(caught.value)
    assert type(caught.value) is FigmentError
    assert path in message
    assert words in message
    assert "ingest" in message
    assert "\n" not in message
    with pytest.raises(StopIteration):
        next(batches)
    wait_until(lambda: threads() == [], f"threads are left: {threads()}")


def test_a_shard_that_is_not_what_the_manifest_says_is_named(s3_store: Store) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", (9, 9), shape=(1, 4, 4))
    with (
        train(fs, replace(manifest, image_shape=(1, 4, 5)), Cursor.start(1)) as batches,
        pytest.raises(FigmentError, match=r"fixed_size_binary\[16\].*its manifest says 9 of.*fixed_size_binary\[20\]"),
    ):
        next(batches)


def test_an_image_that_cannot_be_decoded_is_named_with_its_row(s3_store: Store) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "pngs", (6,), encoding="png")
    shard = manifest.shards("train")[0]
    table = pq.read_table(io.BytesIO(read_object(fs, f"{manifest.root}/{shard.path}")))
    files = table["image"].to_pylist()
    files[4] = files[4][:40]
    sink = io.BytesIO()
    pq.write_table(table.set_column(0, "image", pa.array(files, pa.binary())), sink)
    write_object(fs, f"{manifest.root}/{shard.path}", sink.getvalue())
    shard = replace(shard, bytes=len(sink.getvalue()), sha256=hashlib.sha256(sink.getvalue()).hexdigest())
    with (
        train(fs, replace(manifest, splits={"train": (shard,)}), Cursor.start(1), batch_size=6) as batches,
        pytest.raises(FigmentError, match=f"row 4 of shard {manifest.root}/{shard.path} cannot be decoded"),
    ):
        next(batches)


def test_a_local_folder_serves_as_well(store: pafs.FileSystem) -> None:
    manifest = write_dataset(store, "rows", (5, 6))
    with evaluation_batches(store, manifest, "train", world_size=1, rank=0, batch_size=20) as batches:
        assert next(batches)[1].tolist() == list(range(11))


@pytest.mark.parametrize("end", ["close", "let go"])
def test_stopping_early_leaves_nothing_running(s3_store: Store, end: str) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", (64,) * 8)
    batches = train(fs, manifest, Cursor.start(1))
    next(batches)
    assert threads()
    if end == "close":
        batches.close()
        with pytest.raises(StopIteration):
            next(batches)
        batches.close()
    else:
        del batches
        gc.collect()
    wait_until(lambda: threads() == [], f"threads are left: {threads()}")
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "tasks are left")


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_what_is_read_ahead_is_bounded(
    ray_cluster: str, s3_store: Store, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """A consumer that stands still holds a few windows up, however long the data set is."""
    monkeypatch.setattr(stream, "STORE_BYTES", 4 * 2**20)
    _, fs = s3_store
    shape = (3, 128, 128)  # 21 images make 1 MiB
    manifest = write_dataset(fs, "rows", (21,), shape=shape, encoding=encoding)
    manifest = replace(manifest, splits={"train": manifest.shards("train") * 60})

    def settled() -> int:
        """Bytes in the object store when they have not changed for two seconds."""
        held, since = -1, time.monotonic()
        while time.monotonic() - since < 2:
            now = object_store_bytes(ray_cluster)
            held, since = (held, since) if now == held else (now, time.monotonic())
            time.sleep(0.1)
        return held

    before = settled()  # what an earlier test leaves goes away in its own time
    with training_batches(
        fs, manifest, "train", seed=0, shuffle_shards=1, cursor=Cursor.start(1), rank=0, batch_size=21
    ) as batches:
        next(batches)
        assert 2**20 < settled() - before <= 20 * 2**20
        for _ in range(59):
            next(batches)


def test_the_keys_of_the_storage_are_not_published(s3_store: Store) -> None:
    """Ray writes the arguments of its operators into logs; a filesystem among them would carry its keys there."""
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", (30,))
    with train(fs, manifest, Cursor.start(1)) as batches:
        next(batches)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    as_numbers = ", ".join(str(b) for b in secret.encode())
    for path in (session_folder() / "logs").rglob("*"):
        if path.is_file():
            text = path.read_text(errors="replace")
            assert secret not in text, path
            assert as_numbers not in text, path


@pytest.mark.usefixtures("short_pipelines")
@pytest.mark.parametrize("batches", [0, 1, 5, 16])
def test_so_many_batches_are_the_first_of_the_endless_stream_and_nothing_more_is_read(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    _, fs = s3_store
    manifest = write_dataset(fs, "rows", SHARD_ROWS)
    read: list[int] = []
    blocks = stream._blocks

    def counted(fs: pafs.FileSystem, layout: Layout, reads: Iterator[Read]) -> Generator[pa.Table, None, None]:
        def counting() -> Iterator[Read]:
            for item in reads:
                read.append(item.rows)
                yield item

        return blocks(fs, layout, counting())

    cursor = Cursor.start(2).advance(7)
    with train(fs, manifest, cursor, 1) as endless:
        straight = [next(endless) for _ in range(batches)]
    monkeypatch.setattr(stream, "_blocks", counted)
    with train(fs, manifest, cursor, 1, batches=batches) as few:
        got = list(few)
    assert len(got) == batches
    for (images, labels, _), (wanted_images, wanted_labels, _) in zip(got, straight, strict=True):
        np.testing.assert_array_equal(images, wanted_images)
        np.testing.assert_array_equal(labels, wanted_labels)
    assert sum(read) == batches * 16


def test_a_batch_size_of_nothing_is_refused(store: pafs.FileSystem) -> None:
    manifest = write_dataset(store, "rows", (5,))
    with pytest.raises(FigmentError, match="batch size"):
        train(store, manifest, Cursor.start(1), batch_size=0)
    with pytest.raises(FigmentError, match="no split 'test'"):
        evaluation_batches(store, manifest, "test", world_size=1, rank=0, batch_size=4)
