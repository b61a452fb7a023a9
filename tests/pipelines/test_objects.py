"""Whole objects: never a part of one, never a hidden one, on the disk before they have their name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from pipelines.objects import children, exists, read_object, remove_folder, write_object


def test_what_is_written_is_read_and_listed(store: pafs.FileSystem) -> None:
    write_object(store, "a/b/key", b"one")
    write_object(store, "a/b/key", b"two")
    write_object(store, "a/b/other", memoryview(b"three"))
    assert (read_object(store, "a/b/key"), read_object(store, "a/b/other")) == (b"two", b"three")
    assert (children(store, "a/b"), children(store, "a/c")) == (["key", "other"], [])


def test_a_local_object_is_on_the_disk_before_it_has_its_name(
    store: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power a name must not stand for bytes that were still in memory."""
    flushed: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        if len(flushed) == 1:
            assert Path(flushed[0]).read_bytes() == b"body"
            assert not exists(store, "folder/key")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_object(store, "folder/key", b"body")
    folder = tmp_path / "store" / "folder"
    assert [Path(path).parent for path in flushed[:1]] == [folder]
    assert flushed[1:] == [str(folder)], "the rename is flushed too"
    assert read_object(store, "folder/key") == b"body"


def test_a_write_that_fails_leaves_nothing(store: pafs.FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    write_object(store, "folder/key", b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_object(store, "folder/key", b"after")
    assert [info.base_name for info in store.get_file_info(pafs.FileSelector("folder"))] == ["key"]
    assert read_object(store, "folder/key") == b"before"


def test_hidden_names_are_nobodys_objects(store: pafs.FileSystem) -> None:
    write_object(store, "folder/key", b"")
    write_object(store, "folder/.key.1f3a", b"half of")
    assert children(store, "folder") == ["key"]


def test_a_removed_folder_is_gone_and_removing_it_again_is_harmless(store: pafs.FileSystem) -> None:
    write_object(store, "a/b/key", b"")
    for _ in range(2):
        remove_folder(store, "a/b")
        assert children(store, "a") == []
