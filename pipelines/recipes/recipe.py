"""What stands beside a recipe's spec: where its data come from, on what it runs, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.config import RunSpec


@dataclass(frozen=True)
class Shipped:
    """A file or folder of the repository."""

    path: str
    """From the root of the repository."""


@dataclass(frozen=True)
class Generated:
    """Images that a script of the repository makes: `python SCRIPT FOLDER` writes a source that can be ingested."""

    script: str
    """From the root of the repository."""


@dataclass(frozen=True)
class Downloaded:
    """A data set that is known by name (`pipelines/data/known.py`)."""

    name: str


@dataclass(frozen=True)
class Fetched:
    """Archives that only the user can fetch, since their owner wants a login."""

    what: str
    """What to fetch, and from where."""
    ingest: str
    """The source and the options of `jobs.ingest`."""


Origin = Shipped | Generated | Downloaded | Fetched


@dataclass(frozen=True)
class Recipe:
    """Called, it gives a fresh `RunSpec`."""

    make: Callable[[], RunSpec]
    """Its docstring says what the recipe is; the first line stands in the lists."""
    origin: Origin
    """Where the data set of its spec comes from."""
    hardware: str
    """What the recipe is for."""
    time: str | None = None
    """What it takes there with everything, by an entry of docs/results.md; None: no run has been made yet."""

    def __call__(self) -> RunSpec:
        return self.make()

    @property
    def summary(self) -> str:
        """The first paragraph of what it is, in one line."""
        return " ".join((self.make.__doc__ or "").split("\n\n")[0].split())

    @property
    def takes(self) -> str:
        """`2 CPU cores, 5 min`"""
        return f"{self.hardware}, {self.time or 'not measured yet'}"
