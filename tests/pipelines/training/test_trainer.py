"""Ray Train for real: two workers, killed workers, killed drivers, and errors that must not be tried again."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyarrow import fs as pafs

from infra.conditional import open_conditional
from infra.storage import open_storage
from models.contract import Needs
from pipelines.config import RunSpec
from pipelines.data.columns import Column
from pipelines.data.plan import Cursor, rank_segments, training_plan
from pipelines.errors import FigmentError
from pipelines.lease import LeaseHeldError, hold
from pipelines.objects import children, exists, read_object, write_object
from pipelines.tracking import Tracking
from pipelines.training import trainer
from pipelines.training.reporter import Outcome
from pipelines.training.trainer import launch
from tests.pipelines.data.shards import write_dataset
from tests.pipelines.training.toys import toy_dataset, toy_spec

REPOSITORY = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("ray_cluster")


SPEC = replace(toy_spec("dcgan", images=3_000, workers=2, checkpoint_every=200), recipe="dcgan-demo")
SPEC = replace(SPEC, training=replace(SPEC.training, log_every=1_000, evaluate_every=0))

# What `python -m jobs.train` does, with a lease that a dead launch leaves free after seconds.
LAUNCH = """
import pickle, sys
from infra.conditional import open_conditional
from infra.storage import open_storage
from pipelines.config import RunSpec
from infra.storage import open_storage
from jobs.entry import connect_ray
from pipelines.training import trainer
trainer.LEASE_S = 2.0
store, name, spec = sys.argv[1:]
connect_ray()
trainer.launch(pickle.loads(bytes.fromhex(spec)), open_storage(store), name=name, tracking=None, tags={},
               say=lambda line: print(line, flush=True), leases=open_conditional(store))
"""


def _start(name: str, store: Path, address: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", LAUNCH, str(store), name, pickle.dumps(SPEC).hex()]
        return subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=out, stderr=subprocess.STDOUT)


def _wait_for(what: str, happened: Callable[[], bool], log: Path, seconds: float = 900.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen; the job's output:\n{log.read_text()}"
        time.sleep(0.05)


def _checkpoints(fs: pafs.FileSystem, run: str) -> dict[int, str]:
    """Images seen -> folder of the valid checkpoint."""
    root = f"runs/{run}/checkpoints"
    valid = [name for name in children(fs, root) if exists(fs, f"{root}/{name}/bundle.json")]
    return {int(name.partition("-")[0]): f"{root}/{name}" for name in valid}


def _images_seen(fs: pafs.FileSystem, run: str) -> int:
    return max(_checkpoints(fs, run), default=0)


def _workers() -> list[psutil.Process]:
    """The training workers among this session's own processes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_run_whose_worker_and_then_driver_are_killed_equals_an_uninterrupted_one_to_the_bit(
    ray_cluster: str, tmp_path: Path
) -> None:
    fs, leases, log = open_storage(str(tmp_path)), open_conditional(str(tmp_path)), tmp_path / "log"
    toy_dataset(fs, shape=(3, 16, 16))
    said: list[str] = []

    def launched(name: str, spec: RunSpec = SPEC) -> Outcome:
        return launch(spec, fs, name=name, tracking=None, tags={}, say=said.append, leases=leases)

    launched("whole")
    job = _start("killed", tmp_path, ray_cluster, log)
    _wait_for("the first checkpoint", lambda: _images_seen(fs, "killed") >= 200, log)
    victim = _workers()[0]
    victim.send_signal(signal.SIGKILL)
    at_kill = _images_seen(fs, "killed")
    assert at_kill < 3000, "the run was over before its worker could be killed"
    _wait_for("progress after the loss of a worker", lambda: _images_seen(fs, "killed") > at_kill, log)
    assert job.poll() is None, log.read_text()
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert _images_seen(fs, "killed") < 3000, "the run was over before its driver could be killed"
    _wait_for("the end of the dead driver's workers", lambda: not _workers(), log)

    launched("killed")
    assert any("was in use by process" in line for line in said), "the dead launch's lease is waited for"
    assert any("resumed from runs/killed/checkpoints/" in line for line in said)
    for name in ("networks.safetensors", "ema.safetensors"):
        files = [read_object(fs, f"{_checkpoints(fs, run)[3000]}/{name}") for run in ("whole", "killed")]
        assert files[0] == files[1], name

    launched("killed")
    assert "is complete at 3,000 images" in said[-1]
    with pytest.raises(FigmentError, match=r"training.seed 3 -> 7"):
        launched("killed", replace(SPEC, training=replace(SPEC.training, seed=7)))

    for run in ("whole", "killed"):
        assert set(children(fs, f"runs/{run}")) <= {
            *("run.json", "lease.json", "outcome.json", "checkpoints", "frames"),
            *("samples.png", "training.mp4", "training.gif"),
        }, "nothing of Ray's own stays"


def test_an_error_of_a_later_worker_ends_the_run_in_one_sentence_and_the_tracking_server_hears_of_it(
    store: pafs.FileSystem, mlflow_server: str
) -> None:
    """The shard that only the second worker reads is damaged: the first, which tracks, waits for it in a collective."""
    manifest = toy_dataset(store)
    spec = toy_spec("vae", workers=2)
    plan = training_plan(manifest, "train", seed=spec.training.seed, shuffle_shards=spec.data.shuffle_shards)
    of_first, of_second = (
        {
            s
            for segment in islice(rank_segments(plan, Cursor.start(2), rank), 1)
            for w, *_ in plan.cover(segment)
            for s in w.shards
        }
        for rank in range(2)
    )
    (only_second,) = of_second - of_first
    shard = manifest.shards("train")[only_second]
    write_object(store, f"{manifest.root}/{shard.path}", bytes(shard.bytes))
    tracking = Tracking(mlflow_server, "later-worker")
    said: list[str] = []
    with pytest.raises(FigmentError, match=rf"shard .*{shard.path}.* is damaged"):
        launch(spec, store, name="later", tracking=tracking, tags={}, say=said.append)
    (run,) = _tracked(tracking)
    assert run.info.status == "FAILED"
    assert f"{shard.path}" in run.data.tags["mlflow.note.content"]
    assert sum("starting" in line or "resumed" in line for line in said) == 1, "the restart must not train again"


def test_damaged_held_out_images_end_the_run_at_once_and_the_tracking_server_hears_of_it(
    store: pafs.FileSystem, mlflow_server: str
) -> None:
    manifest = toy_dataset(store)
    shard = manifest.shards("test")[0]
    write_object(store, f"{manifest.root}/{shard.path}", bytes(shard.bytes))
    tracking = Tracking(mlflow_server, "held-out")
    with pytest.raises(FigmentError, match=rf"shard .*{shard.path}.* is damaged"):
        launch(toy_spec("vae"), store, name="held-out", tracking=tracking, tags={}, say=lambda line: None)
    (run,) = _tracked(tracking)
    assert run.info.status == "FAILED"


def _tracked(tracking: Tracking) -> list[Any]:
    client = tracking.client()
    return client.search_runs([client.get_experiment_by_name(tracking.experiment).experiment_id])


def test_a_run_that_another_launch_owns_is_refused_in_one_sentence(store: pafs.FileSystem, tmp_path: Path) -> None:
    toy_dataset(store)
    leases = open_conditional(str(tmp_path / "store"))
    said: list[str] = []
    with (
        hold(leases, "runs/one/lease.json", "process 1 on the other node", ttl_s=1.5),
        pytest.raises(LeaseHeldError, match=r"runs/one is in use by process 1 on the other node"),
    ):
        launch(toy_spec("vae"), store, name="one", tracking=None, tags={}, say=said.append, leases=leases)
    assert children(store, "runs/one") == ["lease.json"]


@pytest.mark.parametrize("name", ["..", "../../out", "a/b", ".hidden", ""])
def test_a_name_that_leads_out_of_the_folder_of_runs_is_refused(name: str, store: pafs.FileSystem) -> None:
    toy_dataset(store)
    with pytest.raises(FigmentError, match="cannot be the name of a folder"):
        launch(toy_spec("vae"), store, name=name, tracking=None, tags={}, say=lambda line: None)
    assert children(store, "") == ["datasets"]


def test_figures_that_could_not_be_measured_at_the_end_are_refused_before_anything_starts(
    store: pafs.FileSystem,
) -> None:
    for shape, test, words in [((1, 8, 8), 1, "split 'test' has 1 image"), ((1, 6, 6), 30, "6x6 are too small")]:
        toy_dataset(store, shape, test=test)
        with pytest.raises(FigmentError, match=words):
            launch(toy_spec("vae"), store, name="early", tracking=None, tags={}, say=lambda line: None)
        assert not exists(store, "runs/early")
        store.delete_dir("datasets")


def test_workers_that_the_cluster_can_never_place_are_refused_at_once(store: pafs.FileSystem) -> None:
    toy_dataset(store)
    spec = toy_spec("vae", workers=20)
    with pytest.raises(FigmentError, match=r"20 workers of 0.5 CPUs .* need 11 logical CPUs, the cluster has 4"):
        launch(spec, store, name="big", tracking=None, tags={}, say=lambda line: None)
    with_gpus = replace(spec, cluster=replace(spec.cluster, gpu="yes"))
    with pytest.raises(FigmentError, match=r"needs 20 GPUs, the cluster has 0"):
        launch(with_gpus, store, name="big", tracking=None, tags={}, say=lambda line: None)


def test_a_model_that_does_not_fit_the_images_is_refused_at_once(store: pafs.FileSystem) -> None:
    toy_dataset(store, shape=(1, 7, 7))
    with pytest.raises(FigmentError, match=r"the model cannot be built for the images of 'toy': .*7"):
        launch(toy_spec("dcgan"), store, name="odd", tracking=None, tags={}, say=lambda line: None)


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (Needs(columns={"factors": 3}), ""),
        (Needs(classes=1), ""),
        (Needs(classes=0, columns={}), ""),
        (Needs(columns={"factors": 4}), r"column 'factors' of 4 numbers, but that of data set 'a@\w+' has 3"),
        (
            Needs(columns={"count": 1}),
            r"column 'count' of 1 numbers, but data set .* has none \(its columns: factors \(3\)\)",
        ),
    ],
)
def test_columns_that_a_model_needs_are_looked_for_before_anything_starts(
    store: pafs.FileSystem, needs: Needs, words: str
) -> None:
    manifest = write_dataset(store, "a", (4,), columns=(Column("factors", ("x", "y", "z")),))
    if not words:
        return trainer._check_needs(needs, manifest)
    with pytest.raises(FigmentError, match=words) as error:
        trainer._check_needs(needs, manifest)
    assert "\n" not in str(error.value)
    return None
