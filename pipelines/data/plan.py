"""Which row comes when, and to which worker: arithmetic alone, no files and no Ray.

The order of an epoch is a pure function of (rows of the shards, seed, epoch). The shards are permuted and grouped into
windows of up to `shuffle_shards`; the rows of a window are permuted together. A *position* p in 0 … N-1 is an index
into that order. Each of W workers takes one contiguous chunk of positions an epoch, ⌊Nk/W⌋ … ⌊N(k+1)/W⌋-1 with
k = (rank + epoch) mod W, so a shard is read once (only a window that the end of a chunk cuts is read by two workers).

Training is one endless stream of epochs: batches are always full and run across the ends of epochs, no row is dropped
and no worker waits for a batch that another one does not have. Because the chunks of consecutive epochs are neighbours
(mod W), what a worker has been given after any number of whole epochs differs from any other's by at most one row.
Every worker consumes the same number of rows a step, so the state of the whole stream is one small `Cursor`, known to
every worker without asking the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, count
from typing import Any

import numpy as np

from pipelines.data.manifest import Manifest
from pipelines.errors import FigmentError

WINDOW_BYTES = 128 * 2**20  # of pixels: a task puts out one window, so this and not the data set bounds its memory

Segment = tuple[int, int, int]
"""(epoch, start, stop): positions start … stop-1 of the order of that epoch."""


@dataclass(frozen=True)
class Window:
    """Shards whose rows are permuted together: positions start … stop-1 of one epoch."""

    index: int
    start: int
    stop: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The order of every epoch of one split.

    `shard_rows`: rows of each shard, in stored order. `window_rows`: a window of two or more shards has no more rows.
    """

    shard_rows: tuple[int, ...]
    seed: int
    shuffle_shards: int
    window_rows: int = 2**62

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise FigmentError("the split has no rows to train on; ingest images into it or name another split")
        if self.seed < 0:
            raise FigmentError(f"the seed of the data order must be 0 or more, not {self.seed}")
        if self.shuffle_shards < 1:
            raise FigmentError(f"shuffle_shards must be 1 or more (shards mixed together), not {self.shuffle_shards}")

    @property
    def rows(self) -> int:
        """N, rows of one epoch."""
        return sum(self.shard_rows)

    def windows(self, epoch: int) -> tuple[Window, ...]:
        """The windows of an epoch in the order in which they are read; together they cover 0 … N-1."""
        return _windows(self, epoch)

    def cover(self, segment: Segment) -> Iterator[tuple[Window, int, int]]:
        """A segment as (window, lo, hi): rows lo … hi-1 of each window's order, in order."""
        epoch, start, stop = segment
        for window in self.windows(epoch):
            lo, hi = max(start, window.start), min(stop, window.stop)
            if lo < hi:
                yield window, lo - window.start, hi - window.start


def window_order(seed: int, epoch: int, window: Window) -> np.ndarray:
    """int64 (stop - start,): element i is the row, counted through the window's shards, at position start + i."""
    return permutation(window.stop - window.start, seed, epoch, 1, window.index)


def training_plan(manifest: Manifest, split: str, *, seed: int, shuffle_shards: int) -> Plan:
    """The plan of a split; windows are cut short where they would hold more than `WINDOW_BYTES` of decoded pixels."""
    shards = manifest.shards(split)
    if not any(shard.rows for shard in shards):
        raise FigmentError(f"split {split!r} of data set {manifest.name!r} has no rows; ingest images or name another")
    window_rows = max(1, WINDOW_BYTES // math.prod(manifest.image_shape))
    return Plan(tuple(shard.rows for shard in shards), seed, shuffle_shards, window_rows)


@dataclass(frozen=True)
class Cursor:
    """Where the stream of all workers stands; small, the same on every worker, and JSON.

    `rows`: rows that each rank has consumed since the cursor was cut (at the start, or by `resize`).
    `pending`: segments to be read before the whole epochs that begin with `epoch`; they are shared out like an epoch.
    """

    world_size: int
    rows: int = 0
    epoch: int = 0
    pending: tuple[Segment, ...] = ()

    @classmethod
    def start(cls, world_size: int) -> Cursor:
        if world_size < 1:
            raise ValueError(f"world_size must be 1 or more, not {world_size}")
        return cls(world_size)

    def advance(self, rows: int) -> Cursor:
        """After every rank has consumed `rows` more rows."""
        return replace(self, rows=self.rows + rows)

    def resize(self, plan: Plan, world_size: int) -> Cursor:
        """The same stream for another number of workers: each row that nobody has seen is still to come, once.

        Unchanged when the number is the same, so that an ordinary restart keeps the order to the row.
        """
        if world_size == self.world_size:
            return self
        left = [_remaining(plan, self, rank) for rank in range(self.world_size)]
        untouched = max(epoch + (offset > 0) for _, epoch, offset in left)
        pending: list[Segment] = []
        for rank, (segments, epoch, offset) in enumerate(left):
            pending += segments
            for e in range(epoch, untouched):
                start, stop = _chunk(plan.rows, self.world_size, rank + e)
                pending.append((e, start + (offset if e == epoch else 0), stop))
        return replace(Cursor.start(world_size), epoch=untouched, pending=_coalesce(pending))

    def to_dict(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "rows": self.rows,
            "epoch": self.epoch,
            "pending": [list(segment) for segment in self.pending],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Cursor:
        try:
            pending = tuple((int(epoch), int(start), int(stop)) for epoch, start, stop in value["pending"])
            return cls(int(value["world_size"]), int(value["rows"]), int(value["epoch"]), pending)
        except (KeyError, TypeError, ValueError) as error:
            raise FigmentError(
                f"the data cursor of the checkpoint is not readable ({error!r}); resume from an older checkpoint"
            ) from error


def rank_segments(plan: Plan, cursor: Cursor, rank: int) -> Iterator[Segment]:
    """Endless: what this rank still has to read, in order. No segment is empty.

    After any number of rows two ranks differ by at most two rows in how far they are (one where nothing was pending).
    """
    segments, epoch, offset = _remaining(plan, cursor, rank)
    yield from segments
    for e in count(epoch):
        start, stop = _chunk(plan.rows, cursor.world_size, rank + e)
        if start + offset < stop:
            yield e, start + offset, stop
        offset = 0


def evaluation_share(shard_rows: tuple[int, ...], world_size: int, rank: int) -> list[tuple[int, int, int]]:
    """This rank's contiguous share of one pass in stored order, as (shard, lo, hi); shares differ by at most 1."""
    start, stop = _chunk(sum(shard_rows), world_size, rank)
    share, first = [], 0
    for shard, rows in enumerate(shard_rows):
        lo, hi = max(start - first, 0), min(stop - first, rows)
        if lo < hi:
            share.append((shard, lo, hi))
        first += rows
    return share


def _remaining(plan: Plan, cursor: Cursor, rank: int) -> tuple[list[Segment], int, int]:
    """(pending segments this rank has still to read, its epoch after them, rows consumed of that epoch)."""
    if not 0 <= rank < cursor.world_size:
        raise ValueError(f"rank {rank} is not one of the {cursor.world_size} of the cursor")
    skip, segments = cursor.rows, []
    total = sum(stop - start for _, start, stop in cursor.pending)
    begin, end = _chunk(total, cursor.world_size, rank)
    first = 0
    for epoch, start, stop in cursor.pending:
        lo, hi = max(begin - first, 0), min(end - first, stop - start)
        first += stop - start
        if lo < hi:
            used = min(skip, hi - lo)
            skip -= used
            if lo + used < hi:
                segments.append((epoch, start + lo + used, start + hi))
    # In W consecutive epochs a rank takes every chunk once: N rows.
    cycles, skip = divmod(skip, plan.rows)
    epoch = cursor.epoch + cycles * cursor.world_size
    while skip:
        start, stop = _chunk(plan.rows, cursor.world_size, rank + epoch)
        if skip < stop - start:
            break
        skip -= stop - start
        epoch += 1
    return segments, epoch, skip


def _chunk(rows: int, world_size: int, number: int) -> tuple[int, int]:
    k = number % world_size
    return rows * k // world_size, rows * (k + 1) // world_size


def _coalesce(segments: list[Segment]) -> tuple[Segment, ...]:
    joined: list[Segment] = []
    for epoch, start, stop in sorted(segments):
        if start >= stop:
            continue
        if joined and joined[-1][0] == epoch and joined[-1][2] == start:
            joined[-1] = (epoch, joined[-1][1], stop)
        else:
            joined.append((epoch, start, stop))
    return tuple(joined)


@lru_cache(maxsize=8)
def _windows(plan: Plan, epoch: int) -> tuple[Window, ...]:
    groups: list[list[int]] = []
    held = 0
    for shard in permutation(len(plan.shard_rows), plan.seed, epoch, 0, 0).tolist():
        rows = plan.shard_rows[shard]
        if rows == 0:
            continue
        if groups and len(groups[-1]) < plan.shuffle_shards and held + rows <= plan.window_rows:
            groups[-1].append(shard)
            held += rows
        else:
            groups.append([shard])
            held = rows
    stops = list(accumulate(sum(plan.shard_rows[s] for s in group) for group in groups))
    starts = [0, *stops[:-1]]
    return tuple(
        Window(i, a, b, tuple(group)) for i, (a, b, group) in enumerate(zip(starts, stops, groups, strict=True))
    )


def permutation(n: int, *key: int) -> np.ndarray:
    """int64 (n,): 0 … n-1 in an order that `key` alone decides, for ever."""
    # Sorting raw bits, because numpy promises the bits of PCG64 for ever, but not what Generator.permutation makes of
    # them: a run must resume in the same order under a newer numpy.
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")
