"""Which version a name means, and what an unreadable manifest blocks: nothing but itself."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from pyarrow import fs as pafs

from pipelines.data.manifest import Manifest, load_manifest, save_manifest, versions
from pipelines.errors import FigmentError
from pipelines.objects import read_object, write_object
from tests.pipelines.data.shards import write_dataset


def three_versions(fs: pafs.FileSystem) -> list[Manifest]:
    """The oldest first; their names are in no order."""
    first = write_dataset(fs, "a", (3,))
    found = [
        replace(first, label_names=(f"label {i}",), created_at=f"2026-01-0{i}T00:00:00+00:00") for i in range(2, 5)
    ]
    fs.delete_dir(first.folder)
    for manifest in found:
        save_manifest(fs, manifest)
    return found


def test_the_newest_is_meant_and_any_can_be_named(store: pafs.FileSystem) -> None:
    found = three_versions(store)
    assert load_manifest(store, "a") == found[-1]
    assert versions(store, "a") == found[::-1] and versions(store, "nothing") == []
    for manifest in found:
        assert load_manifest(store, f"a@{manifest.version}") == manifest


DAMAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"format": "figment-dataset-1", "name": "a", "splits": []}',
    b'{"format": "figment-dataset-9"}',
]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_an_unreadable_old_version_blocks_only_itself(
    store: pafs.FileSystem, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    old, middle, new = three_versions(store)
    write_object(store, f"{old.folder}/manifest.json", damage)
    save_manifest(store, new)  # the youngest file
    with caplog.at_level(logging.WARNING):
        assert load_manifest(store, "a") == new
    (record,) = caplog.records
    assert f"{old.folder}/manifest.json" in record.getMessage() and f"a@{new.version} is used" in record.getMessage()
    assert "may be newer" not in record.getMessage()
    assert versions(store, "a") == [new, middle]
    assert load_manifest(store, f"a@{middle.version}") == middle
    with pytest.raises(FigmentError, match=f"{old.folder}/manifest.json"):
        load_manifest(store, f"a@{old.version}")


def test_what_may_be_the_newest_is_said_when_it_is_passed_over(
    store: pafs.FileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    _, middle, new = three_versions(store)
    body = json.loads(read_object(store, f"{new.folder}/manifest.json"))
    write_object(store, f"{new.folder}/manifest.json", json.dumps(body | {"encoding": "png"}).encode())
    with caplog.at_level(logging.WARNING):
        assert load_manifest(store, "a") == middle
    assert "may be newer" in caplog.text and "edited" in caplog.text


def test_only_unreadable_versions_are_an_error(store: pafs.FileSystem) -> None:
    for manifest in three_versions(store):
        write_object(store, f"{manifest.folder}/manifest.json", b"{")
    with pytest.raises(FigmentError, match="not a readable manifest"):
        load_manifest(store, "a")
    assert versions(store, "a") == []
