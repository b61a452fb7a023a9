"""What `make train` does, in small: an ingest and a training by `ray job submit`, on real S3 and MLflow servers."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from pyarrow import fs as pafs

from pipelines.data.manifest import load_manifest
from pipelines.objects import exists
from pipelines.ray_private import dashboard_url

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def job_server(ray_cluster: str) -> str:
    """The address of the cluster's job server, which takes jobs by now."""
    return f"http://{dashboard_url()}"


def _submit(job_server: str, *command: str) -> subprocess.CompletedProcess[str]:
    """The documented command line, as a user types it."""
    environment = {**os.environ, "RAY_API_SERVER_ADDRESS": job_server}
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", "."]
    return subprocess.run(
        [*submit, "--", sys.executable, "-m", *command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_recipe_and_its_data_through_job_submission_end_in_pictures_and_a_tracked_run(
    job_server: str, s3_store: tuple[str, pafs.FileSystem], mlflow_server: str, tmp_path: Path
) -> None:
    """The shipped data travel with the code, so the job needs nothing else."""
    url, fs = s3_store
    options = {
        "--model.hidden": "16",
        "--training.images": "640",
        "--training.batch-size": "32",
        "--training.log-every": "160",
        "--training.checkpoint-every": "320",
        "--visuals.frames": "5",
        "--visuals.grid": "4",
        "--cluster.cpus-per-worker": "0.5",
        "--store": url,
        "--tracking": mlflow_server,
        "--output": str(tmp_path / "out"),
    }
    train = _submit(
        job_server, "jobs.train", "vae-demo", "--ingest", *(part for item in options.items() for part in item)
    )
    assert train.returncode == 0, train.stdout + train.stderr
    for words in (
        "2 worker(s)",
        "img/s",
        "stall",
        "ETA",
        "sample grid",
        "animation",
        "MLflow",
        "expected elbo",
        "got ",
    ):
        assert words in train.stdout, words
    manifest = load_manifest(fs, "mnist-sample")
    assert (manifest.rows("train"), manifest.rows("test")) == (10_000, 2_000)

    with Image.open(tmp_path / "out" / "samples.png") as picture:
        grid = np.asarray(picture)
    assert min(grid.shape[:2]) >= 4 * 28
    frames = iio.imread(io.BytesIO((tmp_path / "out" / "training.mp4").read_bytes()), extension=".mp4")
    assert len(frames) >= 5
    assert exists(fs, f"runs/vae-demo/checkpoints/{640:012d}-00001/bundle.json")

    client = MlflowClient(mlflow_server)
    (experiment,) = [e for e in client.search_experiments() if e.name == "figment"]
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'vae-demo'")
    assert run.info.status == "FINISHED"
    assert run.data.params["training.images"] == "640"
    assert run.data.tags["data.version"] == manifest.version
    assert run.data.tags["mlflow.source.name"].startswith("python -m jobs.train vae-demo --ingest")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development", "the pages for training"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "elbo")]
    assert steps == [160, 320, 480, 640]
    assert {f.path for f in client.list_artifacts(run.info.run_id, "final")} >= {
        "final/samples.png",
        "final/training.mp4",
    }
    model = mlflow.pyfunc.load_model(f"{_registry(mlflow_server)}/figment-vae-demo@challenger")
    images = model.predict(np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32))
    assert images.shape == (3, 1, 28, 28) and 0 <= images.min() <= images.max() <= 1

    of_run, of_store = tmp_path / "of_run.png", tmp_path / "of_store.png"
    _draw("runs/vae-demo", "--store", url, "--output", str(of_store))
    _draw(run.info.run_id, "--tracking", mlflow_server, "--output", str(of_run))
    assert of_store.read_bytes() == of_run.read_bytes(), "one model, two ways to it, the same pixels"
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in train.stdout + train.stderr + repr(run.data)


def _draw(*arguments: str) -> None:
    command = [sys.executable, "-m", "jobs.sample", "--n", "9", "--columns", "3", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def _registry(uri: str) -> str:
    mlflow.set_tracking_uri(uri)
    return "models:"
