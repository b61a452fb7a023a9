"""What a run tells a real MLflow server, at first and when it is resumed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from pyarrow import fs as pafs

from pipelines.objects import children
from pipelines.tracking import CHALLENGER, Status, Tracking, add_to_run, fetch_published, open_run
from pipelines.tracking.outbox import Outbox

# isort: split
import mlflow
from asking import PATIENCE_S, Generator, eventually, history, segments


def test_a_run_tells_everything(tracking: Tracking, outbox: tuple[pafs.FileSystem, str]) -> None:
    params = {"model": {"name": "dcgan", "latent": 100}, "sizes": [1, 2], "long": "x" * 10_000}
    tags = {"mlflow.source.git.commit": "abc123"}
    run = open_run(tracking, name="first", outbox=outbox, params=params, tags=tags, system_metrics_s=0.2)
    assert run.run_id is not None
    run.metrics({"loss": 2.0, "images_per_s": 10.0}, 100)
    run.metrics({"loss": 1.0}, 200)
    run.artifact(b"\x89PNG", "samples/000000000100.png")
    run.note("**dcgan** on `cifar10`")
    run.dataset("cifar10", "0123456789ab", "f" * 64, source="datasets/cifar10", rows=4096)
    client = tracking.client()
    eventually(lambda: "system/cpu_utilization_percentage" in client.get_run(run.run_id).data.metrics)
    assert run.close("FINISHED", PATIENCE_S) == 0
    assert run.trouble is None and segments(outbox) == []

    stored = tracking.client().get_run(run.run_id)
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "first")
    assert stored.data.params["model.latent"] == "100" and stored.data.params["sizes"] == "[1, 2]"
    assert len(stored.data.params["long"]) == 6000
    assert stored.data.tags["mlflow.source.git.commit"] == "abc123"
    assert stored.data.tags["mlflow.note.content"] == "**dcgan** on `cifar10`"
    assert stored.data.tags["data.version"] == "0123456789ab"
    (data,) = [i.dataset for i in stored.inputs.dataset_inputs]
    assert (data.name, data.digest) == ("cifar10", "f" * 36)
    assert history(tracking, run.run_id, "loss") == [(100, 2.0), (200, 1.0)]
    memory = history(tracking, run.run_id, "system/system_memory_usage_percentage")
    assert all(0 < share < 100 for _, share in memory)
    assert [f.path for f in tracking.client().list_artifacts(run.run_id, "samples")] == ["samples/000000000100.png"]
    experiment = stored.info.experiment_id
    assert run.url == f"{tracking.uri}/#/experiments/{experiment}/runs/{run.run_id}"


def test_values_that_are_not_finite_become_tags(tracking: Tracking, outbox: tuple[pafs.FileSystem, str]) -> None:
    run = open_run(tracking, name="nan", outbox=outbox, system_metrics_s=None)
    run.metrics({"loss": float("nan"), "other": 1.0}, 10)
    run.metrics({"loss": float("inf")}, 20)
    assert run.close("FAILED", PATIENCE_S) == 0
    stored = tracking.client().get_run(run.run_id)
    assert stored.info.status == "FAILED"
    assert stored.data.metrics == {"other": 1.0}
    assert stored.data.tags["nonfinite.loss"] == "nan at 10 images seen"


def test_what_the_server_does_not_take_holds_nothing_up(
    tracking: Tracking, outbox: tuple[pafs.FileSystem, str], caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(tracking, name="poison", outbox=outbox, system_metrics_s=None)
    with caplog.at_level(logging.WARNING):
        run.artifact(b"a file", "a.bin")
        run.artifact(b"as if it were a folder", "a.bin/b.bin")
        run.artifact(b"another", "../c.bin")
        run.metrics({"loss": 1.0}, 1)
        assert run.close("FINISHED", PATIENCE_S) == 1  # kept, for it may be the store behind the server
    assert history(tracking, run.run_id, "loss") == [(1, 1.0)]
    assert tracking.client().get_run(run.run_id).info.status == "FINISHED"
    assert [f.path for f in tracking.client().list_artifacts(run.run_id)] == ["a.bin", "c.bin"]
    assert "artifact is tried again later" in caplog.text
    ((kept,),) = [Outbox(*outbox).read(name) for name in segments(outbox)]
    assert kept.payload == b"as if it were a folder"


def test_what_the_server_refuses_is_said_and_left_out(
    tracking: Tracking, outbox: tuple[pafs.FileSystem, str], caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(tracking, name="refused", outbox=outbox, system_metrics_s=None)
    with caplog.at_level(logging.WARNING):
        run.dataset("n" * 600, "v", "h", source="nowhere", rows=1)
        run.metrics({"loss": 1.0}, 1)
        assert run.close("FINISHED", PATIENCE_S) == 0
    assert history(tracking, run.run_id, "loss") == [(1, 1.0)]
    assert "MLflow refused dataset" in caplog.text


def test_without_a_server_a_run_keeps_nothing(outbox: tuple[pafs.FileSystem, str]) -> None:
    run = open_run(None, name="none", outbox=outbox)
    run.metrics({"loss": 1.0}, 1)
    run.artifact(b"x", "a.png")
    run.publish(Generator(), torch.zeros(2, 5), files={}, registered_name=None)
    assert run.settle() and run.close("FINISHED") == 0
    assert run.run_id is run.url is run.trouble is run.model is None
    assert children(*outbox) == []


@pytest.mark.servers
def test_sqlite_needs_no_server(
    tmp_path: Path, outbox: tuple[pafs.FileSystem, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # set by MLflow on the way, and undone at the end
    tracking = Tracking(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = open_run(tracking, name="local", outbox=outbox, system_metrics_s=None, wait_s=PATIENCE_S)
    run.metrics({"loss": 1.0}, 1)
    run.artifact(b"hello", "a.bin")
    run.publish(Generator().eval(), torch.zeros(2, 5), files={"spec.json": b"{}"}, registered_name="local")
    assert run.close("FINISHED", PATIENCE_S) == 0
    assert run.url is None
    assert history(tracking, run.run_id, "loss") == [(1, 1.0)]
    assert next((tmp_path / "mlflow-artifacts").rglob("a.bin")).read_bytes() == b"hello"
    assert fetch_published(tracking, f"models:/local@{CHALLENGER}") == {"spec.json": b"{}"}
    mlflow.set_tracking_uri(None)


@pytest.mark.servers
@pytest.mark.parametrize("status", ["FAILED", "FINISHED", None])
def test_what_is_added_to_a_run_leaves_its_status_and_its_end(
    tmp_path: Path, outbox: tuple[pafs.FileSystem, str], monkeypatch: pytest.MonkeyPatch, status: Status | None
) -> None:
    """None: it is still at work."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    tracking = Tracking(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert add_to_run(tracking, outbox, tags={"a": "b"}, artifacts={}) == 0 and children(*outbox) == []
    run = open_run(tracking, name="a", outbox=outbox, system_metrics_s=None, wait_s=PATIENCE_S)
    run.metrics({"loss": 1.0}, 1)
    run_id = run.run_id
    assert run.settle(PATIENCE_S) and run_id is not None
    if status is not None:
        assert run.close(status, PATIENCE_S) == 0
    before = tracking.client().get_run(run_id).info
    added = {"eval.fid": "3.5 fid-1 features=net:0"}
    assert add_to_run(tracking, outbox, tags=added, artifacts={"evaluations/k.json": b"{}"}, timeout_s=PATIENCE_S) == 0
    after = tracking.client().get_run(run_id)
    assert (after.info.status, after.info.end_time) == (before.status, before.end_time)
    assert after.info.status == (status or "RUNNING") and after.data.tags["eval.fid"] == added["eval.fid"]
    assert next((tmp_path / "mlflow-artifacts").rglob("k.json")).read_bytes() == b"{}"
    if status is None:
        assert run.close("FINISHED", PATIENCE_S) == 0
    mlflow.set_tracking_uri(None)


@pytest.mark.parametrize("by", ["run id", "outbox"])
def test_a_resumed_run_is_the_same_run_without_double_points(
    tracking: Tracking, outbox: tuple[pafs.FileSystem, str], by: str
) -> None:
    first = open_run(tracking, name="a", outbox=outbox, params={"lr": 1}, system_metrics_s=None)
    for seen in (100, 200, 300):
        first.metrics({"loss": 1000.0 - seen}, seen)
    first.metrics({"test/bits": 5.0}, 200)
    assert first.close("KILLED", PATIENCE_S) == 0

    # From the checkpoint at 150 on, everything is computed and told again.
    run_id = first.run_id if by == "run id" else None
    again = open_run(
        tracking, name="a", outbox=outbox, run_id=run_id, params={"lr": 2, "new": 3}, system_metrics_s=None
    )
    assert again.run_id == first.run_id
    assert tracking.client().get_run(again.run_id).info.status == "RUNNING"
    for seen in (200, 300, 400):
        again.metrics({"loss": 1000.0 - seen}, seen)
    again.metrics({"test/bits": 5.0}, 200)
    again.metrics({"test/bits": 4.0}, 400)
    assert again.close("FINISHED", PATIENCE_S) == 0

    stored = tracking.client().get_run(again.run_id)
    assert stored.info.status == "FINISHED"
    assert history(tracking, again.run_id, "loss") == [(100, 900.0), (200, 800.0), (300, 700.0), (400, 600.0)]
    assert history(tracking, again.run_id, "test/bits") == [(200, 5.0), (400, 4.0)]
    assert stored.data.params == {"lr": "1", "new": "3"}
    assert stored.data.tags["resumed_with.lr"] == "2"
    assert len(tracking.client().search_runs([stored.info.experiment_id])) == 1


def test_a_run_that_the_server_lost_begins_anew(tracking: Tracking, outbox: tuple[pafs.FileSystem, str]) -> None:
    run = open_run(tracking, name="a", outbox=outbox, run_id="0" * 32, system_metrics_s=None)
    run.metrics({"loss": 1.0}, 1)
    assert run.close("FINISHED", PATIENCE_S) == 0
    assert run.run_id not in (None, "0" * 32)
    assert history(tracking, run.run_id, "loss") == [(1, 1.0)]
