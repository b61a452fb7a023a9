"""Where rows go: the same place every time, full shards, and a mixture in each of them."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from pipelines.data.images import Bad, Row
from pipelines.data.packing import Journal, Scatter, check_name, even_parts, pack
from pipelines.errors import FigmentError
from pipelines.objects import exists, read_object, write_object


@settings(deadline=None)
@given(rows=st.integers(1, 400), rows_per_shard=st.integers(1, 20), mix=st.integers(1, 9))
def test_scatter_is_a_function_of_the_index(rows: int, rows_per_shard: int, mix: int) -> None:
    one, other = Scatter("train", rows_per_shard, mix), Scatter("train", rows_per_shard, mix)
    places = [one.place() for _ in range(rows)]
    assert places == [other.place() for _ in range(rows)]
    counts = Counter(number for number, _ in places)
    assert max(counts.values()) <= rows_per_shard
    assert sum(n < rows_per_shard for n in counts.values()) <= mix  # at most so many are open at once


def test_each_shard_of_a_sorted_source_is_a_mixture() -> None:
    """100 classes of 200 rows, one after the other; 16 open shards of 100 rows see about 8 classes each, not 1."""
    scatter = Scatter("train", 100, 16)
    classes: dict[int, list[tuple[int, int]]] = {}
    for row in range(20_000):
        number, key = scatter.place()
        classes.setdefault(number, []).append((key, row // 200))
    full = [[label for _, label in sorted(rows)] for rows in classes.values() if len(rows) == 100]
    assert len(full) > 150
    assert np.mean([len(set(labels)) for labels in full]) > 6
    # Within a shard the order says nothing of the class: neighbours are of one class as often as any two rows.
    neighbours = np.mean([np.mean(np.array(labels[1:]) == np.array(labels[:-1])) for labels in full])
    any_two = np.mean([sum(n * (n - 1) for n in Counter(labels).values()) / (100 * 99) for labels in full])
    assert abs(neighbours - any_two) < 0.02


@settings(deadline=None)
@given(n=st.integers(0, 300), largest=st.integers(1, 50))
def test_even_parts_lose_nothing(n: int, largest: int) -> None:
    parts = even_parts(range(n), largest)
    assert [i for part in parts for i in part] == list(range(n))
    assert len(parts) == -(-n // largest)
    assert not parts or (max(map(len, parts)) <= largest and max(map(len, parts)) - min(map(len, parts)) <= 1)


def rows(n: int = 5, seed: int = 0) -> list[Row | Bad]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 3, 4, 4), np.uint8)
    return [Row(p.tobytes(), i, tuple(p.sum(axis=(1, 2)).tolist())) for i, p in enumerate(pixels)]


def test_a_shard_that_is_there_is_not_written_again_and_a_damaged_one_is(store: pafs.FileSystem) -> None:
    first = pack(store, "datasets/a", rows(), "raw")[0].shard
    assert first is not None
    path = f"datasets/a/{first.path}"
    before = store.get_file_info(path).mtime_ns
    again, written = pack(store, "datasets/a", rows(), "raw")
    assert again.shard == first and not written
    assert store.get_file_info(path).mtime_ns == before
    whole, other = read_object(store, path), pack(store, "datasets/b", rows(seed=1), "raw")[0].shard
    assert other is not None
    for damaged in (b"half a sha", read_object(store, f"datasets/b/{other.path}")):
        write_object(store, path, damaged)
        again, written = pack(store, "datasets/a", rows(), "raw")
        assert again.shard == first and written
        assert read_object(store, path) == whole


def test_the_journal_gives_back_what_is_still_there(store: pafs.FileSystem) -> None:
    journal = Journal(store, "a", "key")
    one, _ = pack(store, "datasets/a", [*rows(), Bad("x.jpeg", "torn")], "raw")
    other, _ = pack(store, "datasets/a", rows(seed=1), "raw")
    nothing, _ = pack(store, "datasets/a", [Bad("y", "z")], "raw")
    journal.add("train", 3, one)
    journal.add("train", 7, other)
    journal.add("two-words", 0, nothing)
    assert one.skipped_members == ("x.jpeg: torn",) and nothing.shard is None
    assert journal.load() == {("train", 3): one, ("train", 7): other, ("two-words", 0): nothing}
    assert other.shard is not None
    store.delete_file(f"datasets/a/{other.shard.path}")
    assert set(Journal(store, "a", "key").load()) == {("train", 3), ("two-words", 0)}
    assert Journal(store, "a", "another").load() == {}
    journal.delete()
    assert journal.load() == {}


def test_entries_of_a_journal_that_cannot_be_read_are_not_there(store: pafs.FileSystem) -> None:
    journal = Journal(store, "a", "key")
    one, _ = pack(store, "datasets/a", rows(), "raw")
    journal.add("train", 3, one)
    folder = "datasets/a/.ingest-key"
    names = ["train-0000004.json", "train-0000005.json.part-12345678", "train-0000006.json", "notes.txt"]
    for name, body in zip(names, [b"", b"{", b'{"shard": {"path": "x"}}', b"x"], strict=True):
        write_object(store, f"{folder}/{name}", body)
    assert journal.load() == {("train", 3): one}


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_journal_can_be_deleted_under_its_writer(kind: str, request: pytest.FixtureRequest) -> None:
    """Three ingests of one source: each adds, reads and, at its end, deletes."""
    fs = request.getfixturevalue("store") if kind == "folder" else request.getfixturevalue("s3_store")[1]
    packed, _ = pack(fs, "datasets/a", rows(), "raw")

    def ingest_often() -> None:
        for i in range(60 if kind == "folder" else 6):
            journal = Journal(fs, "a", "key")
            assert all(found == packed for found in journal.load().values())
            for number in range(3):
                journal.add("train", 10 * i + number, packed)
            journal.delete()

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(ingest_often) for _ in range(3)]:
            done.result()
    assert Journal(fs, "a", "key").load() == {}
    assert not exists(fs, "datasets/a/.ingest-key")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "ä", "-"])
def test_names_that_are_no_path_segment(name: str) -> None:
    with pytest.raises(FigmentError, match="data set name"):
        check_name(name)
    check_name("cifar-10_v1.2")
