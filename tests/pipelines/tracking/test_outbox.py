"""The courier and the outbox, with a server that can be told what to do."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence

from asking import PATIENCE_S, segments
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from infra.storage import open_storage
from pipelines.tracking.outbox import Courier, Outbox, Record, Unreachable


def points(step: int) -> Record:
    return Record("points", {"values": {"x": 1.0}, "step": step, "time_ms": 0}, "s")


def test_a_server_that_hangs_holds_nobody_up(outbox: tuple[pafs.FileSystem, str]) -> None:
    answer = threading.Event()

    def deliver(records: Sequence[Record]) -> list[Record]:
        answer.wait()
        return []

    courier = Courier(Outbox(*outbox), lambda: None, deliver)
    for step in range(1000):
        courier.put(points(step))
    assert courier.settle(0.05)  # kept, for nobody took them
    assert [r.body["step"] for name in segments(outbox) for r in Outbox(*outbox).read(name)] == list(range(1000))
    answer.set()
    assert courier.close(PATIENCE_S) == 0


@settings(max_examples=40, deadline=None)
@given(
    answers=st.lists(st.sampled_from(["taken", "down", "late"]), max_size=12),
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6),
)
def test_every_record_arrives_whatever_fails(answers: list[str], sizes: list[int]) -> None:
    script, seen = iter(answers), []

    def deliver(records: Sequence[Record]) -> list[Record]:
        answer = next(script, "taken")
        if answer == "down":
            raise Unreachable("down")
        late = list(records[::2]) if answer == "late" else []
        seen.extend(record.body["step"] for record in records if record not in late)
        return late

    with tempfile.TemporaryDirectory() as folder:
        box = Outbox(open_storage(folder), "box")
        courier = Courier(box, lambda: None, deliver)
        courier._pause = lambda delay: None  # type: ignore[method-assign]
        step = 0
        for size in sizes:
            for _ in range(size):
                courier.put(points(step))
                step += 1
            assert courier.settle(PATIENCE_S)
        left = courier.close(PATIENCE_S)
        kept = [record.body["step"] for name in box.segments() for record in box.read(name)]
    assert len(kept) >= left and sorted({*seen, *kept}) == list(range(step))
    if "late" not in answers:
        assert kept == [] and list(dict.fromkeys(seen)) == list(range(step))  # and in order


def test_the_outbox_gives_back_what_it_was_given(outbox: tuple[pafs.FileSystem, str]) -> None:
    box = Outbox(*outbox)
    records = [points(1), Record("artifact", {"path": "ä.png"}, "s", b"\x00\n\xff" * 1000), points(2)]
    first, second = box.keep(records), box.keep([points(3)])
    assert box.segments() == [first, second]
    assert box.read(first) == records
    box.drop(first)
    box.drop(first)
    assert box.segments() == [second]
