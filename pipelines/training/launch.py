"""What a run is to those who work on it: values that travel to the workers, and a worker's place among the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pyarrow import fs as pafs

from pipelines.config import RunSpec
from pipelines.data.manifest import Manifest
from pipelines.errors import FigmentError
from pipelines.lease import current_token


@dataclass(frozen=True)
class Place:
    """Where a worker stands among the others."""

    rank: int
    world_size: int
    device: torch.device


class TakenOverError(FigmentError):
    """Another launch owns the run: what there is to say about it is for that one to say."""


@dataclass(frozen=True)
class Launch:
    """What a run needs, as values that travel to the workers."""

    name: str
    spec: RunSpec
    fs: pafs.FileSystem
    manifest: Manifest
    fence: int = 0
    """The number of this launch among those that owned the run; 0: nobody else can (a test)."""
    token: str = ""
    """By which the lease of the run is known as this launch's."""

    @property
    def folder(self) -> str:
        return f"runs/{self.name}"

    @property
    def lease(self) -> str:
        return f"{self.folder}/lease.json"

    def check_owner(self) -> None:
        """`TakenOverError` when a later launch owns the run: this one has been given up for dead and must not go on."""
        if not self.token:
            return
        owner = current_token(self.fs, self.lease)
        if owner is None:
            raise TakenOverError(
                f"{self.lease} was removed: whoever owns run {self.name!r} now, this launch ends here; the same command"
                " goes on from the last checkpoint"
            )
        if owner != self.token:
            raise TakenOverError(
                f"run {self.name!r} was taken over by another launch while this one did not answer: this one ends, and"
                " the other goes on from the last checkpoint"
            )
