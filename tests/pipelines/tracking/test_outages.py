"""A server that goes away, comes late or never, and a process that is killed: nothing is lost, nothing is double."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from asking import OUTBOX, PATIENCE_S, Generator, Stoppable, history, segments
from pyarrow import fs as pafs

from pipelines.errors import FigmentError
from pipelines.tracking import Tracking, fetch_published, open_run, send_outbox
from pipelines.tracking.outbox import Courier, Outbox, Record


def test_an_outage_loses_nothing_and_holds_nobody_up(
    server: Stoppable, tracking: Tracking, outbox: tuple[pafs.FileSystem, str]
) -> None:
    run = open_run(tracking, name="outage", outbox=outbox, system_metrics_s=None)
    run.metrics({"loss": 0.0}, 0)
    server.down()
    # These calls return although there is nobody who could answer them.
    for seen in range(1, 2001):
        run.metrics({"loss": float(seen), "gain": -float(seen)}, seen)
    run.artifact(b"picture", "samples/1.png")
    run.publish(Generator().eval(), torch.zeros(2, 5), files={"spec.json": b"{}"}, registered_name="outage")
    assert run.settle(PATIENCE_S)
    assert run.trouble is not None and segments(outbox)
    server.up()
    run.metrics({"loss": 2001.0}, 2001)
    assert run.close("FINISHED", PATIENCE_S) == 0

    assert run.trouble is None and segments(outbox) == []
    assert history(tracking, run.run_id, "loss") == [(i, float(i)) for i in range(2002)]
    assert history(tracking, run.run_id, "gain") == [(i, -float(i)) for i in range(1, 2001)]
    assert [f.path for f in tracking.client().list_artifacts(run.run_id, "samples")] == ["samples/1.png"]
    assert run.model == "models:/outage/1"
    assert tracking.client().get_run(run.run_id).info.status == "FINISHED"


def test_a_run_that_never_met_its_server_is_sent_later(
    server: Stoppable, tracking: Tracking, outbox: tuple[pafs.FileSystem, str]
) -> None:
    server.down()
    first = open_run(tracking, name="alone", outbox=outbox, params={"lr": 1}, system_metrics_s=None)
    for seen in (100, 200):
        first.metrics({"loss": float(seen)}, seen)
    assert first.run_id is None and first.url is None
    assert first.close("KILLED", 1.0) > 0

    # Its next process does not meet the server either, and tells again what came after the checkpoint at 100.
    second = open_run(tracking, name="alone", outbox=outbox, params={"lr": 1}, system_metrics_s=None)
    for seen in (200, 300):
        second.metrics({"loss": float(seen)}, seen)
    second.artifact(b"x", "a.bin")
    assert second.close("FINISHED", 1.0) > 0

    with pytest.raises(FigmentError, match="does not take requests"):
        fetch_published(tracking, "models:/m/1")
    assert send_outbox(tracking, outbox, timeout_s=1.0) > 0
    server.up()
    assert send_outbox(tracking, outbox, PATIENCE_S) == 0
    client = tracking.client()
    (stored,) = client.search_runs([client.get_experiment_by_name(tracking.experiment).experiment_id])
    assert stored.info.status == "FINISHED" and stored.data.params == {"lr": "1"}
    assert history(tracking, stored.info.run_id, "loss") == [(100, 100.0), (200, 200.0), (300, 300.0)]
    assert [f.path for f in client.list_artifacts(stored.info.run_id)] == ["a.bin"]
    assert send_outbox(tracking, outbox) == 0  # nothing is left, nothing is sent twice
    assert len(client.search_runs([stored.info.experiment_id])) == 1


def test_records_of_a_killed_process_are_sent_by_the_next(
    server: Stoppable, tracking: Tracking, tmp_path: Path, outbox: tuple[pafs.FileSystem, str]
) -> None:
    server.down()
    program = f"""
import os, signal
from infra.storage import open_storage
from pipelines.tracking import Tracking, open_run
run = open_run(Tracking({tracking.uri!r}, {tracking.experiment!r}), name="killed", system_metrics_s=None,
               outbox=(open_storage({str(tmp_path / "store")!r}), {OUTBOX!r}))
for seen in (1, 2, 3):
    run.metrics({{"loss": float(seen)}}, seen)
assert run.settle()
os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", program], timeout=PATIENCE_S, capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    server.up()
    run = open_run(tracking, name="killed", outbox=outbox, system_metrics_s=None)
    for seen in (3, 4):
        run.metrics({"loss": float(seen)}, seen)
    assert run.close("FINISHED", PATIENCE_S) == 0
    assert history(tracking, run.run_id, "loss") == [(i, float(i)) for i in (1, 2, 3, 4)]


def test_a_repeated_delivery_changes_nothing(
    tracking: Tracking, outbox: tuple[pafs.FileSystem, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a process that was killed between the server's answer and taking the records out of the outbox."""
    box = Outbox(*outbox)
    run = open_run(tracking, name="again", outbox=outbox, system_metrics_s=None)
    kept: list[Record] = []
    put = Courier.put
    monkeypatch.setattr(Courier, "put", lambda self, record: (kept.append(record), put(self, record))[1])
    run.metrics({"loss": 1.0}, 1)
    run.artifact(b"x", "a.bin")
    run.publish(Generator().eval(), torch.zeros(2, 5), files={}, registered_name=(name := uuid.uuid4().hex))
    assert run.close("FINISHED", PATIENCE_S) == 0
    monkeypatch.undo()
    assert len(kept) == 4

    box.keep(kept)
    assert send_outbox(tracking, outbox, PATIENCE_S) == 0
    assert history(tracking, run.run_id, "loss") == [(1, 1.0)]
    assert len(tracking.client().search_model_versions(f"name = '{name}'")) == 1
    assert len(tracking.client().get_run(run.run_id).outputs.model_outputs) == 1
