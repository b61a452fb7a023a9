"""Which bundles a run has: the one that all its workers go on from, and those that are removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pyarrow import fs as pafs

from pipelines.errors import FigmentError
from pipelines.objects import write_object
from pipelines.training.checkpoint import load_bundle, save_bundle
from pipelines.training.history import highest_fence, newest_bundle, prune_bundles
from tests.pipelines.training.pair import Pair
from tests.pipelines.training.test_checkpoint import RUN, _bundle, _flip, _path, _save, _state


def test_pruning_keeps_the_newest_and_clears_what_a_kill_left(store: pafs.FileSystem) -> None:
    state = _state("vae", 1)
    for images in (10, 20, 30, 40):
        _save(store, _bundle("vae", images), state)
    store.delete_file(f"{_path(20)}/bundle.json")
    store.create_dir(_path(50))  # being written
    prune_bundles(store, RUN, keep=2, fence=0)
    assert _left(store) == [30, 40, 50]


def test_without_a_whole_bundle_nothing_is_found_and_nothing_is_pruned(store: pafs.FileSystem) -> None:
    assert newest_bundle(store, RUN) == (None, [])
    prune_bundles(store, RUN, keep=1, fence=0)
    for images in (10, 20):
        store.create_dir(_path(images))
    prune_bundles(store, RUN, keep=1, fence=0)
    assert _left(store) == [10, 20]
    assert newest_bundle(store, RUN) == (None, [])


class Dying:
    """A storage on which a kill comes before a folder is deleted."""

    def __init__(self, fs: pafs.FileSystem) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def delete_dir(self, path: str) -> None:
        raise ConnectionError(path)


def test_a_kill_in_the_middle_of_pruning_leaves_no_bundle_that_is_valid_and_incomplete(store: pafs.FileSystem) -> None:
    for images in (10, 20):
        _save(store, _bundle("vae", images), _state("vae", 1))
    with pytest.raises(ConnectionError):
        prune_bundles(Dying(store), RUN, keep=1, fence=0)
    assert _left(store) == [10, 20]
    with pytest.raises(FigmentError, match="not a complete checkpoint"):
        load_bundle(store, _path(10))


def _left(fs: pafs.FileSystem) -> list[int]:
    found = fs.get_file_info(pafs.FileSelector(f"{RUN}/checkpoints"))
    return sorted(int(info.base_name.partition("-")[0]) for info in found)


def test_what_else_lies_among_the_checkpoints_is_neither_taken_nor_removed(store: pafs.FileSystem) -> None:
    state = _state("vae", 1)
    for images in (10, 20, 30):
        _save(store, _bundle("vae", images), state)
    root = f"{RUN}/checkpoints"
    store.create_dir(f"{root}/best")
    pafs.copy_files(_path(10), f"{root}/best", source_filesystem=store, destination_filesystem=store)
    for stray in ("000000000005", "notes.txt", "000000000040-00000"):
        write_object(store, f"{root}/{stray}", b"a file")
    newest, _ = newest_bundle(store, RUN)
    assert newest is not None and newest.bundle.path == _path(30)
    prune_bundles(store, RUN, keep=1, fence=0)
    left = {info.base_name for info in store.get_file_info(pafs.FileSelector(root))}
    assert left == {"best", "000000000005", "notes.txt", "000000000040-00000", Path(_path(30)).name}


def test_the_later_launch_counts_and_an_earlier_one_cannot_remove_what_it_wrote(store: pafs.FileSystem) -> None:
    state = _state("vae", 1)
    for images, fence in ((10, 1), (20, 1), (15, 2), (30, 1)):  # the first launch did not notice that it was over
        _save(store, _bundle("vae", images, fence), state)
    newest, _ = newest_bundle(store, RUN)
    assert newest is not None and newest.bundle.path == _path(15, 2)
    prune_bundles(store, RUN, keep=1, fence=1)
    assert _left(store) == [15, 30]
    prune_bundles(store, RUN, keep=1, fence=2)
    assert _left(store) == [15]
    write_object(store, f"{_path(5, 7)}/rank-00000.pt", b"half a checkpoint")
    assert (highest_fence(store, RUN), highest_fence(store, "runs/new")) == (7, 0)


def _two_workers(rank: int, folder: str) -> tuple[str, list[str], list[str], list[str]]:
    store = pafs.SubTreeFileSystem(folder, pafs.LocalFileSystem())
    for images in (24, 48):
        save_bundle(store, _bundle("vae", images), _state("vae", rank), rank)
    dist.barrier()
    if rank == 1:
        _flip(store, f"{_path(48)}/rank-00001.pt")
    found, damaged = newest_bundle(store, RUN, rank)
    assert found is not None
    return found.bundle.path, sorted(found.bundle.files), sorted(found.payloads), damaged


def test_what_one_worker_finds_damaged_none_goes_on_from(tmp_path: Path, pair: Pair) -> None:
    shared = ["ema.safetensors", "networks.safetensors", "optimizers.pt"]
    for rank, (path, files, payloads, damaged) in enumerate(pair.run(_two_workers, str(tmp_path))):
        assert path == _path(24)
        assert files == sorted([*shared, "rank-00000.pt", "rank-00001.pt"])
        assert payloads == sorted([*shared, f"rank-0000{rank}.pt"])
        (sentence,) = damaged
        assert _path(48) in sentence and "rank-00001.pt" in sentence
