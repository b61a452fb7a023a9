"""The order of the data is arithmetic: what it promises is checked as properties, without Ray and without files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.manifest import Manifest, Shard
from pipelines.data.plan import (
    WINDOW_BYTES,
    Cursor,
    Plan,
    _coalesce,
    evaluation_share,
    rank_segments,
    training_plan,
    window_order,
)
from pipelines.errors import FigmentError

shard_rows = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(tuple)
plans = st.builds(Plan, shard_rows, st.integers(0, 2**63), st.integers(1, 6), st.integers(1, 60))
worlds = st.integers(1, 7)


def epoch_order(plan: Plan, epoch: int) -> list[tuple[int, int]]:
    """(shard, row) at every position, put together naively."""
    order = []
    for window in plan.windows(epoch):
        rows = [(shard, row) for shard in window.shards for row in range(plan.shard_rows[shard])]
        order += [rows[i] for i in window_order(plan.seed, epoch, window)]
    return order


def take(plan: Plan, cursor: Cursor, rank: int, n: int) -> list[tuple[int, int]]:
    """The next n rows of a rank, as (epoch, position)."""
    rows = ((e, p) for e, start, stop in rank_segments(plan, cursor, rank) for p in range(start, stop))
    return list(islice(rows, n))


def take_all(plan: Plan, cursor: Cursor, n: int) -> list[tuple[int, int]]:
    return [row for rank in range(cursor.world_size) for row in take(plan, cursor, rank, n)]


@given(plans, st.integers(0, 1000))
def test_every_epoch_is_a_permutation_of_all_rows(plan: Plan, epoch: int) -> None:
    everything = [(shard, row) for shard, rows in enumerate(plan.shard_rows) for row in range(rows)]
    assert sorted(epoch_order(plan, epoch)) == everything
    windows = plan.windows(epoch)
    assert all(plan.shard_rows[shard] for window in windows for shard in window.shards), "no shard is read for nothing"
    assert [w.start for w in windows] == [0, *(w.stop for w in windows[:-1])]
    assert windows[-1].stop == plan.rows
    for window in windows:
        assert len(window.shards) <= plan.shuffle_shards
        assert window.stop - window.start <= plan.window_rows or len(window.shards) == 1


@given(plans, worlds, st.integers(1, 5))
def test_every_row_comes_exactly_once_an_epoch_over_all_workers(plan: Plan, world: int, epochs: int) -> None:
    """W epochs give each rank N rows; so after k*N rows a rank, k*W epochs are complete and nothing else was read."""
    seen = Counter(take_all(plan, Cursor.start(world), epochs * plan.rows))
    assert seen == Counter((e, p) for e in range(epochs * world) for p in range(plan.rows))


@given(plans, worlds)
def test_workers_never_drift_apart(plan: Plan, world: int) -> None:
    """The rows of the first E epochs are shared out evenly for every E, not only in the long run."""
    for epochs in range(1, 2 * world + 1):
        shares = [
            sum(stop - start for _, start, stop in _until(plan, Cursor.start(world), rank, epochs))
            for rank in range(world)
        ]
        assert max(shares) - min(shares) <= 1
        assert sum(shares) == epochs * plan.rows


@given(plans, worlds, st.integers(0, 200), st.integers(0, 200), st.integers(1, 100))
def test_a_restart_goes_on_at_the_next_row(plan: Plan, world: int, first: int, second: int, n: int) -> None:
    cursor = Cursor.start(world)
    later = Cursor.from_dict(json.loads(json.dumps(cursor.advance(first).advance(second).to_dict())))
    for rank in range(world):
        assert all(start < stop for _, start, stop in islice(rank_segments(plan, later, rank), 5)), "none is empty"
        assert take(plan, later, rank, n) == take(plan, cursor, rank, first + second + n)[first + second :]


@given(plans, st.lists(st.tuples(worlds, st.integers(0, 90)), min_size=2, max_size=5), worlds)
def test_resizing_keeps_every_row_exactly_once(plan: Plan, phases: list[tuple[int, int]], last: int) -> None:
    cursor = Cursor.start(phases[0][0])
    seen: Counter[tuple[int, int]] = Counter()
    for world, rows in phases:
        cursor = Cursor.from_dict(json.loads(json.dumps(cursor.resize(plan, world).to_dict())))
        assert cursor.world_size == world
        seen.update(take_all(plan, cursor, rows))
        cursor = cursor.advance(rows)
    cursor = cursor.resize(plan, last)
    epochs = max([cursor.epoch, *(epoch for epoch, _ in seen)]) + 1  # on to the end of every epoch that was begun
    for rank in range(last):
        assert all(start < stop for _, start, stop in islice(rank_segments(plan, cursor, rank), 5)), "none is empty"
        seen.update((e, p) for e, start, stop in _until(plan, cursor, rank, epochs) for p in range(start, stop))
    assert seen == Counter((e, p) for e in range(epochs) for p in range(plan.rows))


@given(plans, worlds, worlds, st.integers(0, 200))
def test_after_resizing_ranks_differ_by_two_rows_at_most(plan: Plan, old: int, new: int, rows: int) -> None:
    cursor = Cursor.start(old).advance(rows).resize(plan, new)
    shares = [
        sum(stop - start for epoch, start, stop in _until(plan, cursor, rank, cursor.epoch + 3)) for rank in range(new)
    ]
    assert max(shares) - min(shares) <= 2


def _until(plan: Plan, cursor: Cursor, rank: int, epoch: int) -> list[tuple[int, int, int]]:
    segments = []
    for segment in rank_segments(plan, cursor, rank):
        if segment[0] >= epoch:
            return segments
        segments.append(segment)
    raise AssertionError("segments are endless")


def test_the_same_number_of_workers_keeps_the_cursor() -> None:
    cursor = Cursor(3, 17, 2, ((1, 5, 9),))
    assert cursor.resize(Plan((20, 20), 0, 2), 3) is cursor


@given(plans, st.integers(0, 500), st.integers(0, 10**12))
def test_going_on_after_very_many_rows_is_quick_and_exact(plan: Plan, extra: int, cycles: int) -> None:
    """N rows a rank are W epochs, whatever the number of rows so far."""
    near, far = Cursor.start(3).advance(extra), Cursor.start(3).advance(extra + cycles * plan.rows)
    for rank in range(3):
        assert take(plan, far, rank, 5) == [(e + 3 * cycles, p) for e, p in take(plan, near, rank, 5)]


@given(shard_rows, st.integers(1, 9))
def test_evaluation_shares_are_the_stored_order_cut_evenly(rows: tuple[int, ...], world: int) -> None:
    shares = [evaluation_share(rows, world, rank) for rank in range(world)]
    assert all(lo < hi for share in shares for _, lo, hi in share)
    read = [(shard, row) for share in shares for shard, lo, hi in share for row in range(lo, hi)]
    assert read == [(shard, row) for shard, n in enumerate(rows) for row in range(n)]
    sizes = [sum(hi - lo for _, lo, hi in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_is_the_same_in_every_process_and_for_ever() -> None:
    """Written down: a run must resume in the order in which it began, on another machine and another numpy."""
    plan = Plan((3, 4, 2, 5), seed=7, shuffle_shards=2)
    expected = [[w.shards for w in plan.windows(0)], [window_order(7, 0, w).tolist() for w in plan.windows(0)]]
    assert expected == [[(3, 0), (2, 1)], [[5, 1, 2, 7, 6, 4, 0, 3], [4, 0, 2, 1, 3, 5]]]
    code = (
        "from pipelines.data.plan import *; p = Plan((3, 4, 2, 5), 7, 2);"
        "print([[w.shards for w in p.windows(0)], [window_order(7, 0, w).tolist() for w in p.windows(0)]])"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == str(expected)


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [epoch_order(Plan((50,) * 8, seed, 3), epoch) for seed in range(4) for epoch in range(4)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            same = sum(x == y for x, y in zip(a, b, strict=True))
            assert same < 20  # of 400; 1 is expected by chance


def test_rows_are_well_mixed() -> None:
    """Neighbours in the order are strangers in storage, and each batch holds rows of every shard of its window."""
    plan = Plan((250,) * 40, seed=3, shuffle_shards=8)
    order = np.array([shard * 250 + row for shard, row in epoch_order(plan, 0)])
    positions = np.arange(len(order))
    assert abs(np.corrcoef(positions, order)[0, 1]) < 0.35  # 5 windows of 8 random shards: blocks remain, no trend
    window = order[: plan.windows(0)[0].stop]
    assert abs(np.corrcoef(np.arange(len(window)), window)[0, 1]) < 0.1
    assert np.mean(np.diff(order) == 1) < 0.005
    for i in range(0, len(order) - 2000, 2000):
        for j in range(i, i + 2000 - 128, 128):
            assert len(set(order[j : j + 128] // 250)) == 8


def test_windows_are_bounded_by_bytes() -> None:
    rows = 5000
    shards = tuple(Shard(f"{i}", rows, 60 * rows, "", "") for i in range(32))
    shape = (3, 64, 64)
    manifest = Manifest("m", {"train": shards}, shape, "raw", ("a",), (0.0,) * 3, {}, "")
    plan = training_plan(manifest, "train", seed=0, shuffle_shards=16)
    sizes = [w.stop - w.start for w in plan.windows(0)]
    assert max(sizes) * 3 * 64 * 64 <= WINDOW_BYTES < (max(sizes) + rows) * 3 * 64 * 64
    encoded = Manifest("m", {"train": shards}, shape, "png", ("a",), (0.0,) * 3, {}, "")
    assert training_plan(encoded, "train", seed=0, shuffle_shards=16) == plan  # a task decodes its window


@pytest.mark.parametrize(
    ("shards", "seed", "shuffle_shards", "word"),
    [((0, 0), 0, 1, "no rows"), ((3,), -1, 1, "seed"), ((3,), 0, 0, "shuffle_shards")],
)
def test_impossible_plans_are_refused(shards: tuple[int, ...], seed: int, shuffle_shards: int, word: str) -> None:
    with pytest.raises(FigmentError, match=word):
        Plan(shards, seed, shuffle_shards)


@pytest.mark.parametrize("broken", [{}, {"world_size": 2, "rows": "x", "epoch": 0, "pending": []}, {"pending": [[1]]}])
def test_an_unreadable_cursor_is_named(broken: dict) -> None:
    with pytest.raises(FigmentError, match="data cursor"):
        Cursor.from_dict(broken)


@given(plans, st.integers(0, 50), st.data())
def test_a_segment_is_covered_by_the_windows_row_by_row(plan: Plan, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.rows))
    stop = data.draw(st.integers(start, plan.rows))
    pieces = list(plan.cover((epoch, start, stop)))
    assert all(0 <= lo < hi <= window.stop - window.start for window, lo, hi in pieces)
    assert [window.start + i for window, lo, hi in pieces for i in range(lo, hi)] == list(range(start, stop))


def test_what_is_pending_is_joined_within_an_epoch_and_never_across_two() -> None:
    assert _coalesce([(1, 4, 6), (0, 2, 2), (0, 2, 4), (0, 0, 2), (1, 6, 9)]) == ((0, 0, 4), (1, 4, 9))
    assert _coalesce([(0, 0, 2), (0, 3, 4), (2, 3, 3)]) == ((0, 0, 2), (0, 3, 4))


def test_ranks_and_workers_that_there_are_not_are_refused() -> None:
    for rank in (-1, 3):
        with pytest.raises(ValueError, match="not one of the 3"):
            next(rank_segments(Plan((5,), 0, 1), Cursor.start(3), rank))
    with pytest.raises(ValueError, match="1 or more"):
        Cursor.start(0)


def test_a_split_without_rows_is_named() -> None:
    manifest = Manifest("m", {"extra": ()}, (1, 2, 2), "raw", ("a",), (0.0,), {}, "")
    with pytest.raises(FigmentError, match="split 'extra' of data set 'm' has no rows"):
        training_plan(manifest, "extra", seed=0, shuffle_shards=1)


@pytest.mark.parametrize(
    ("plan", "cursor", "workers"),
    [
        (Plan((5,), 0, 1), Cursor(2, rows=4, epoch=2, pending=((0, 2, 5),)), 3),
        (Plan((1,), 0, 1), Cursor(5, rows=4, epoch=2, pending=((0, 0, 1),)), 6),
    ],
)
def test_resizing_while_one_worker_is_an_epoch_ahead_of_another_loses_nothing(
    plan: Plan, cursor: Cursor, workers: int
) -> None:
    """Seldom met by the property above: what one has taken of its epoch says nothing about the next one's chunk."""
    resized = cursor.resize(plan, workers)
    before, after = (
        Counter(
            (epoch, position)
            for rank in range(c.world_size)
            for epoch, start, stop in _until(plan, c, rank, resized.epoch)
            for position in range(start, stop)
        )
        for c in (cursor, resized)
    )
    assert after == before


def test_a_window_may_be_exactly_full() -> None:
    assert [len(window.shards) for window in Plan((5, 5, 5, 5), 0, 4, window_rows=10).windows(0)] == [2, 2]
