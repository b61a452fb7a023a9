"""Numbers beside the label: as a format gives them, in shards, in the manifest, and out again in the order of rows."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from pipelines.data import ingest_options, sources, stream
from pipelines.data.columns import Column, ColumnError
from pipelines.data.images import Row, prepare
from pipelines.data.ingest import ingest
from pipelines.data.ingest_options import IngestOptions, ingest_key, layout_of
from pipelines.data.manifest import Manifest, load_manifest, save_manifest
from pipelines.data.packing import pack
from pipelines.data.plan import Window, window_order
from pipelines.data.sources import read_images
from pipelines.data.sources_io import EncodedImage, Images, RawImage, Source
from pipelines.data.windows import Layout, Read, read_window
from pipelines.errors import FigmentError
from pipelines.objects import read_object, write_object
from tests.pipelines.data.archives import local, picture, random_images
from tests.pipelines.data.shards import image_of, numbers_of, write_dataset

FACTORS = Column("factors", ("azimuth", "elevation", "light"))
MARKS = Column("marks", ("hat", "glasses"), "uint8")
COUNT = Column("count", ("balls",), "int32")
ALL = (FACTORS, MARKS, COUNT)
OPTIONS = IngestOptions("made", rows_per_shard=16, mix_shards=3)


# --- what a column may be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entries", "dtype", "words"),
    [
        ("Factors", ("a",), "float32", "cannot be called 'Factors'"),
        ("label", ("a",), "float32", "cannot be called 'label'"),
        ("a.b", ("a",), "float32", "cannot be called"),
        ("", ("a",), "float32", "cannot be called"),
        ("x" * 101, ("a",), "float32", "cannot be called"),
        ("a", (), "float32", "has 0 numbers"),
        ("a", tuple(map(str, range(4097))), "float32", "has 4,097 numbers"),
        ("a", ("b", ""), "float32", "need names"),
        ("a", ("b", 3), "float32", "need names"),
        ("a", ("b", "c", "b"), "float32", "two entries of column 'a' are called 'b'"),
        ("a", ("b",), "float64", "is of 'float64'"),
    ],
)
def test_columns_that_cannot_be(name: str, entries: tuple[str, ...], dtype: str, words: str) -> None:
    with pytest.raises(ColumnError, match=words):
        Column(name, entries, dtype)


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [
        (FACTORS, [1, -2.5, 3e38], [[1, 2], [1, 2, 3, 4], [[1, 2, 3]], [1, np.nan, 2], [np.inf, 0, 0], [0, 0, 1e39], "a"]),  # noqa: E501
        (MARKS, [True, 255], [[0, 256], [-1, 0], [0.5, 1], [np.nan, 0], ["a", "b"], [1]]),
        (COUNT, [-(2**31)], [[2**31], [1.5], [np.inf], [None], []]),
    ],
)  # fmt: skip
def test_only_numbers_that_are_stored_as_they_are_make_a_row(column: Column, good: list, bad: list) -> None:
    column.check(good)
    assert np.array_equal(column.stack([good])[0], np.asarray(good, column.dtype))
    for values in bad:
        with pytest.raises(ColumnError, match=column.name):
            column.check(values)


def test_lists_of_uneven_length_are_no_column() -> None:
    uneven = pa.chunked_array([pa.array([[1, 2], [3], [4, 5, 6]], MARKS.stored)])
    missing = pa.chunked_array([pa.array([[1, 2], None], MARKS.stored)])
    for column in (uneven, missing):
        with pytest.raises(ColumnError, match="not every row of column 'marks' has 2"):
            MARKS.numbers(column)
    both = pa.chunked_array([pa.array([[1, 2]], MARKS.stored), pa.array([[0, 0], [3, 4]], MARKS.stored).slice(1)])
    assert MARKS.numbers(both).tolist() == [[1, 2], [3, 4]]
    assert MARKS.numbers(pa.chunked_array([], MARKS.stored)).shape == (0, 2)


# --- from a format ----------------------------------------------------------------------------------------------------


def made(columns: tuple[Column, ...], rows: list[dict[str, object]]) -> Images:
    """A format of as many raw images as there are rows."""

    def read(source: Source) -> Images:
        source.columns = columns
        for i, (image, values) in enumerate(zip(random_images(len(rows), (1, 4, 4)).pixels, rows, strict=True)):
            yield RawImage("test" if i % 5 == 4 else "train", image, i, f"m[{i}]", values)  # type: ignore[arg-type]
        return tuple(map(str, range(len(rows))))

    return read  # type: ignore[return-value]


def values_of(row: int) -> dict[str, object]:
    return {column.name: numbers_of(row, column) for column in ALL}


@pytest.mark.parametrize(
    ("columns", "change", "words"),
    [
        (ALL, {"marks": [1, 2, 3]}, r"m\[2\]: column 'marks' has shape \(3,\), 2 numbers are described"),
        (ALL, {"factors": [0, 1, float("nan")]}, r"m\[2\]: 'light' of column 'factors' is nan"),
        (ALL, {"count": [1.5]}, r"m\[2\]: 'balls' of column 'count' is 1.5, which is no int32"),
        (ALL, {"more": [1]}, r"m\[2\]: it has a column 'more', which is not described"),
        (ALL, None, r"m\[2\]: it has no column 'factors'"),
        (ALL[:2], {}, r"m\[0\]: it has a column 'count', which is not described"),
        ((), {}, r"m\[0\]: it has a column 'factors', which is not described"),
        ((*ALL, FACTORS), {}, "two columns are called 'factors'"),
        (tuple(Column(f"c{i}", ("x",)) for i in range(33)), {}, "33 columns are described"),
    ],
)
def test_what_does_not_fit_the_description_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: tuple[Column, ...], change: dict | None, words: str
) -> None:
    rows = [values_of(i) for i in range(4)]
    rows[2] = {} if change is None else rows[2] | change
    monkeypatch.setitem(sources.FORMATS, "made", made(columns, rows))
    with pytest.raises(FigmentError, match=words) as error:
        list(read_images(local(tmp_path), "made"))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_picture_takes_its_columns_to_a_worker_and_back() -> None:
    sent: list[pickle.PickleBuffer] = []
    image = EncodedImage("train", picture(0), 3, "x", {"marks": np.array([1, 0], np.uint8)})
    body = pickle.dumps(image, 5, buffer_callback=sent.append)
    (row,) = prepare([pickle.loads(body, buffers=[bytes(buffer) for buffer in sent])], 32, "raw")
    assert isinstance(row, Row)
    sent.clear()
    body = pickle.dumps(row, 5, buffer_callback=sent.append)
    back = pickle.loads(body, buffers=[bytes(buffer) for buffer in sent])
    assert isinstance(back, Row) and back.image == row.image and np.array_equal(back.columns["marks"], [1, 0])
    assert back.columns["marks"].flags.owndata, "what a worker sent can be deleted"  # type: ignore[union-attr]


def ingested(fs: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int = 90) -> Manifest:
    (tmp_path / "source").touch()
    monkeypatch.setitem(sources.FORMATS, "made", made(ALL, [values_of(i) for i in range(rows)]))
    return ingest(local(tmp_path / "source"), fs, replace(OPTIONS, format="made")).manifest


def test_every_row_keeps_its_own_numbers_in_typed_columns(
    store: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = ingested(store, tmp_path, monkeypatch)
    assert load_manifest(store, "made") == manifest and manifest.columns == ALL
    seen = []
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        table = pq.read_table(pa.BufferReader(read_object(store, f"{manifest.root}/{shard.path}")))
        assert table.column_names == ["image", "label", "factors", "marks", "count"]
        assert [t.value_type for t in table.schema.types[2:]] == [pa.float32(), pa.uint8(), pa.int32()]
        for row in table.to_pylist():
            assert {name: row[name] for name in ("factors", "marks", "count")} == {
                name: values.tolist() for name, values in values_of(row["label"]).items()  # type: ignore[attr-defined]
            }  # fmt: skip
            seen.append(row["label"])
    assert sorted(seen) == list(range(90))
    again = ingested(store, tmp_path, monkeypatch)
    assert again == manifest


def test_formats_that_came_to_have_columns_have_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal of before would give shards without them; the keys of other formats stay what they were."""
    keys = {}
    for revisions in ({}, ingest_options.FORMAT_REVISIONS):
        monkeypatch.setattr(ingest_options, "FORMAT_REVISIONS", revisions)
        for name in ("cifar100-binary", "cifar100-python", "arrays", "cifar10-binary"):
            layout = layout_of(name, RawImage("train", np.zeros((3, 32, 32), np.uint8), 0, ""), OPTIONS)
            keys[name, bool(revisions)] = ingest_key(local(tmp_path), OPTIONS, layout)
    changed = {name for name, new in keys if new and keys[name, True] != keys[name, False]}
    assert changed == {"cifar100-binary", "cifar100-python", "arrays"}


# --- at rest ----------------------------------------------------------------------------------------------------------


def test_a_data_set_without_columns_is_what_it_was_before_there_were_any(store: pafs.FileSystem) -> None:
    """The hash is that of the release before columns, and nothing of the manifest speaks of them."""
    manifest = write_dataset(store, "a", (3, 2))
    assert manifest.content_hash == "2873d8f88c86d8ff79b2f024fdb082cd84f698b7a9dcd0c9d2efde1b39c288f9"
    body = json.loads(read_object(store, f"{manifest.folder}/manifest.json"))
    assert "columns" not in body and load_manifest(store, "a") == manifest


def test_the_description_of_columns_is_part_of_the_version(store: pafs.FileSystem) -> None:
    manifest = write_dataset(store, "a", (3,), columns=ALL)
    other = replace(FACTORS, entries=("azimuth", "elevation", "width"))
    changed = [
        replace(manifest, columns=columns)
        for columns in ((), (FACTORS,), (MARKS, FACTORS, COUNT), (other, MARKS, COUNT))
    ]
    assert len({m.version for m in (manifest, *changed)}) == 5
    path = f"{manifest.folder}/manifest.json"
    body = json.loads(read_object(store, path))
    for columns, words in (
        ([], "edited"),
        ([body["columns"][0]] * 2, "two columns"),
        ([{"name": "a", "entries": ["b"]}], "not a readable manifest"),
        ([{"name": "A", "entries": ["b"], "dtype": "uint8"}], "cannot be called 'A'"),
        ("abc", "not a readable manifest"),
    ):
        write_object(store, path, json.dumps(body | {"columns": columns}).encode())
        with pytest.raises(FigmentError, match=words):
            load_manifest(store, "a")
    save_manifest(store, manifest)
    assert load_manifest(store, "a") == manifest


def test_shards_of_the_same_images_and_other_columns_do_not_take_one_anothers_place(store: pafs.FileSystem) -> None:
    def rows(name: str, values: list[float]) -> list[Row]:
        return [Row(bytes(16), 0, (0,), {name: values}) for _ in range(3)]

    packs = [
        pack(store, "datasets/a", rows("one", [0, 0]), "raw", columns)[0].shard
        for columns in ((), (Column("one", ("x", "y")),), (Column("one", ("x", "y"), "int32"),))
    ]
    packs.append(pack(store, "datasets/a", rows("two", [0, 0]), "raw", (Column("two", ("x", "y")),))[0].shard)
    assert len({shard.path for shard in packs if shard}) == 4
    again, written = pack(store, "datasets/a", rows("two", [0, 0]), "raw", (Column("two", ("x", "y")),))
    assert again.shard == packs[-1] and not written


# --- out again --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_columns_come_in_the_order_of_their_images(store: pafs.FileSystem, encoding: str) -> None:
    manifest = write_dataset(store, "a", (17, 5, 30), encoding=encoding, columns=ALL)
    window = Window(0, 0, 52, (0, 1, 2))
    order = window_order(5, 1, window)[9:50]
    read = Read(manifest.shards("train"), 9, 50, (5, 1, window))
    (block,) = read_window(store, Layout.of(manifest), read)
    assert block["label"].to_pylist() == order.tolist()
    for column in ALL:
        got = column.numbers(block[column.name])
        assert got.dtype == column.dtype
        np.testing.assert_array_equal(got, [numbers_of(row, column) for row in order])


@pytest.mark.parametrize("columns", [ALL, ()])
def test_batches_carry_columns_as_float32_across_blocks(store: pafs.FileSystem, columns: tuple[Column, ...]) -> None:
    layout = Layout.of(write_dataset(store, "a", (7, 6, 9), columns=columns))
    shards = load_manifest(store, "a").shards("train")
    blocks = (block for shard in shards for block in read_window(store, layout, Read((shard,), 0, shard.rows)))
    got = list(stream._batches(blocks, 5, layout))
    assert [len(batch.labels) for batch in got] == [5, 5, 5, 5, 2]
    rows = iter(range(22))
    for batch in got:
        now = list(islice(rows, len(batch.labels)))
        assert batch.labels.tolist() == now and list(batch.columns) == [column.name for column in columns]
        np.testing.assert_array_equal(batch.images, [image_of(row, (1, 4, 4)) for row in now])
        for column in columns:
            values = batch.columns[column.name]
            assert values.dtype == np.float32 and values.flags.c_contiguous and values.flags.writeable
            np.testing.assert_array_equal(values, [numbers_of(row, column) for row in now])
    for one, other in pairwise(got):
        assert not any(np.shares_memory(one.columns[column.name], other.columns[column.name]) for column in columns)


def test_a_shard_whose_columns_are_not_those_of_the_manifest_is_named(store: pafs.FileSystem) -> None:
    manifest = write_dataset(store, "a", (6,), columns=(MARKS,))
    (shard,) = manifest.shards("train")
    for columns, words in (
        ((FACTORS,), r"uint8 not null.*its manifest says|rows of.*its manifest says"),
        ((replace(MARKS, dtype="float32"),), r"rows of .*uint8.* its manifest says 6 of .*float"),
        ((replace(MARKS, entries=("a", "b", "c")),), "not every row of column 'marks' has 3"),
    ):
        with pytest.raises(FigmentError, match=words) as error:
            list(read_window(store, Layout.of(replace(manifest, columns=columns)), Read((shard,), 0, 6)))
        assert shard.path in str(error.value) and "\n" not in str(error.value)
