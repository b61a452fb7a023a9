"""Ray does what pipelines/ray_private.py needs of its private parts. A new version of Ray fails here first."""

from __future__ import annotations

import copy
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data
import yaml
from ray.data import Dataset

from pipelines import ray_private
from pipelines.ray_private import (
    Pace,
    block_refs,
    dashboard_url,
    job_package,
    never_wait_for_the_consumer,
    object_store_bytes,
    paced,
    prepared_cluster_file,
    session_folder,
)

ROOT = Path(__file__).resolve().parents[2]
ROWS = 8


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def executors() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")]


def rows(ends: Path | None = None) -> Dataset:
    """One task whose rows are blocks of their own; it leaves a file at `ends` when the last one is put out."""

    def blocks(batch: pa.Table) -> Iterator[pa.Table]:
        for i in range(ROWS):
            yield pa.table({"row": [i], "ballast": [bytes(2**20)]})
        if ends is not None:
            ends.write_text("all are out")

    dataset = ray.data.from_items([0]).map_batches(blocks, batch_format="pyarrow", num_cpus=0.5)
    dataset.context.target_max_block_size = 2**20
    dataset.context.execution_options.preserve_order = True
    return dataset


@pytest.mark.usefixtures("ray_cluster")
def test_blocks_come_in_order_and_letting_them_go_ends_the_execution() -> None:
    refs = block_refs(rows())
    assert ray.get(next(refs))["row"].to_pylist() == [0]
    assert executors()
    del refs
    wait_until(lambda: executors() == [], "the execution goes on")
    assert [row for ref in block_refs(rows()) for row in ray.get(ref)["row"].to_pylist()] == [*range(ROWS)]


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_ends_before_its_blocks_are_taken(tmp_path: Path) -> None:
    dataset = rows(tmp_path / "ends")
    never_wait_for_the_consumer(dataset.context)
    dataset.context.execution_options.resource_limits = dataset.context.execution_options.resource_limits.copy(
        object_store_memory=2 * 2**20
    )
    refs = block_refs(dataset)
    next(refs)
    wait_until((tmp_path / "ends").exists, "the task waits for its consumer")
    del refs


@pytest.mark.usefixtures("ray_cluster")
def test_the_loop_rests_while_a_block_waits_and_turns_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    rest = Pace.on_execution_step

    def turn(pace: Pace, executor: Any) -> None:
        turns.append(ray_private._waiting_blocks(executor))
        rest(pace, executor)

    def rests() -> bool:
        seen = len(turns)
        time.sleep(0.2)  # in which a loop that does not rest turns many times
        return len(turns) == seen and turns[-1] > 0

    monkeypatch.setattr(Pace, "on_execution_step", turn)
    monkeypatch.setattr(ray_private, "REST_S", 3600.0)
    dataset = rows()
    paced(dataset.context)
    refs = block_refs(dataset)
    for row in range(4):
        if row:
            wait_until(rests, "the loop turns though a block waits")
        before = len(turns)
        assert ray.get(next(refs))["row"].to_pylist() == [row]
        wait_until(lambda seen=before: len(turns) > seen, "the loop sleeps on when a block was taken")
    del refs
    wait_until(lambda: executors() == [], "the loop slept on when the execution was over")


def test_the_bytes_in_the_object_store_are_counted(ray_cluster: str) -> None:
    before = object_store_bytes(ray_cluster)
    held = ray.put(np.zeros(20 * 2**20, np.uint8))
    wait_until(lambda: object_store_bytes(ray_cluster) - before >= 20 * 2**20, "an object is not counted")
    del held


@pytest.mark.usefixtures("ray_cluster")
def test_the_job_server_answers_where_it_is_said_to_be() -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):  # it wants the token
        urllib.request.urlopen(f"http://{dashboard_url()}/api/jobs/", timeout=30)


@pytest.mark.usefixtures("ray_cluster")
def test_the_logs_are_in_the_session_folder() -> None:
    assert [*(session_folder() / "logs").glob("gcs_server*")]


def test_a_cluster_file_is_checked_as_ray_up_does() -> None:
    content = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert "available_node_types" in prepared_cluster_file(copy.deepcopy(content))
    with pytest.raises(jsonschema.ValidationError):
        prepared_cluster_file({**content, "setup_comands": []})


def test_a_package_for_a_job_leaves_out_what_git_ignores(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "a.py").write_text("")
    (folder / "b.log").write_text("")
    (folder / ".gitignore").write_text("*.log\n")
    job_package(folder, tmp_path / "package.zip")
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        assert {"a.py"} <= set(archive.namelist())
        assert "b.log" not in archive.namelist()
