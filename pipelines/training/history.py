"""The checkpoints of one run: their names, the one that the run goes on from, and those that may go.

A name is `IMAGES-FENCE`: the fence is the number of the launch that owned the run (`pipelines/lease.py`), and grows
with every launch. So two launches never write into one folder, whatever one of them believes, and what the later one
wrote counts before anything of an earlier one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyarrow import fs as pafs

from pipelines.errors import FigmentError
from pipelines.objects import exists, read_object, write_object
from pipelines.training.checkpoint import BUNDLE, Bundle, DamagedError, load_bundle, read_payloads
from pipelines.training.collectives import from_first, gather

_NAME = re.compile(r"(\d{12,})(?:-(\d{5,}))?")  # the earliest bundles have no fence


@dataclass(frozen=True, order=True)
class _Checkpoint:
    """Ordered as a run goes on: by launch, then by images seen."""

    fence: int
    images_seen: int
    name: str


@dataclass(frozen=True)
class Found:
    """A bundle whose files are all what was written, and the bytes of those that this worker restores from."""

    bundle: Bundle
    payloads: dict[str, bytes]


def bundle_path(run_folder: str, images_seen: int, fence: int) -> str:
    return f"{run_folder}/checkpoints/{images_seen:012d}-{fence:05d}"


def newest_bundle(fs: pafs.FileSystem, run_folder: str, rank: int = 0) -> tuple[Found | None, list[str]]:
    """The newest whole bundle, and a sentence for each newer one that is damaged. Called by every worker: a bundle is
    whole when all of them find it so.

    `FigmentError` when the run has bundles and none is whole: to begin anew is not for us to decide.
    """
    damaged: list[str] = []
    for name in from_first([checkpoint.name for checkpoint in reversed(_valid(fs, run_folder))]):
        path, found, damage = f"{run_folder}/checkpoints/{name}", None, None
        try:
            bundle = load_bundle(fs, path)
            found = Found(bundle, read_payloads(fs, bundle, bundle.needed_by(rank)))
        except DamagedError as error:
            damage = str(error)
        damages = [reason for reason in gather(damage) if reason is not None]
        if not damages:
            return found, damaged
        damaged.append(f"checkpoint {path} is damaged: {damages[0]}")
    if damaged:
        raise FigmentError(
            f"no checkpoint of {run_folder} is whole ({'; '.join(damaged)}): restore one from a copy, or delete"
            f" {run_folder}/checkpoints and the same command begins anew"
        )
    return None, []


def highest_fence(fs: pafs.FileSystem, run_folder: str) -> int:
    """Of all launches that wrote a checkpoint, half-written ones too; 0 when there is none."""
    return max((checkpoint.fence for checkpoint in _checkpoints(fs, run_folder)), default=0)


def set_aside_later(fs: pafs.FileSystem, run_folder: str, path: str) -> None:
    """Bundles later than the one that the run goes on from are damaged: they do not count any more, neither for a later
    start nor among those that are kept. What they said stays in their folders until it is pruned."""
    root = f"{run_folder}/checkpoints"
    name = path.rpartition("/")[2]
    for checkpoint in reversed(_valid(fs, run_folder)):
        if checkpoint.name == name:
            return
        body = f"{root}/{checkpoint.name}/{BUNDLE}"
        write_object(fs, f"{root}/{checkpoint.name}/damaged.json", read_object(fs, body))
        fs.delete_file(body)


def prune_bundles(fs: pafs.FileSystem, run_folder: str, keep: int, fence: int) -> None:
    """Delete all but the `keep` newest valid bundles, and half-written ones older than the newest valid one; nothing
    that a later launch than `fence` wrote. A bundle loses `bundle.json` first: it is never valid and incomplete."""
    root = f"{run_folder}/checkpoints"
    ours = [checkpoint for checkpoint in _checkpoints(fs, run_folder) if checkpoint.fence <= fence]
    valid = [checkpoint for checkpoint in _valid(fs, run_folder) if checkpoint.fence <= fence]
    for checkpoint in ours:
        if valid and checkpoint < valid[-1] and checkpoint not in valid[-keep:]:
            if checkpoint in valid:
                fs.delete_file(f"{root}/{checkpoint.name}/{BUNDLE}")
            fs.delete_dir(f"{root}/{checkpoint.name}")


def _valid(fs: pafs.FileSystem, run_folder: str) -> list[_Checkpoint]:
    """Oldest first."""
    return [c for c in _checkpoints(fs, run_folder) if exists(fs, f"{run_folder}/checkpoints/{c.name}/{BUNDLE}")]


def _checkpoints(fs: pafs.FileSystem, run_folder: str) -> list[_Checkpoint]:
    """Oldest first; whatever else lies there, by name or by kind, is none of ours."""
    selector = pafs.FileSelector(f"{run_folder}/checkpoints", allow_not_found=True)
    folders = [info.base_name for info in fs.get_file_info(selector) if info.type == pafs.FileType.Directory]
    matches = [match for match in map(_NAME.fullmatch, folders) if match]
    return sorted(_Checkpoint(int(match[2] or 0), int(match[1]), match[0]) for match in matches)
