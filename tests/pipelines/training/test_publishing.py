"""What a finished run of a classifier leaves on the tracking server, and in its folder."""

from __future__ import annotations

import uuid
from dataclasses import replace

import mlflow
import pytest
import torch
from pyarrow import fs as pafs

from models.contract import Classifies
from pipelines.tracking import Tracking, fetch_published
from pipelines.training.launch import Launch, Place
from pipelines.training.reporter import TrackedReporter
from pipelines.training.worker import TrainingLoop
from tests.pipelines.training.toys import toy_dataset, toy_spec

HERE = Place(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.mark.usefixtures("in_process")
def test_a_classifier_is_published_beside_its_generator_and_its_error_is_a_figure(
    store: pafs.FileSystem, mlflow_server: str
) -> None:
    name = f"classifier-{uuid.uuid4().hex[:8]}"
    spec = replace(toy_spec("semi-supervised", images=60), recipe=name)
    launch = Launch(name, spec, store, toy_dataset(store))
    tracking = Tracking(mlflow_server, experiment=name)
    reporter = TrackedReporter(launch, HERE.device, tracking, {}, lambda line: None)
    loop = TrainingLoop(launch, HERE, reporter)
    outcome = reporter.finish(loop, loop.run())
    assert 0 <= outcome.figures["error"] <= 1 and "cross_entropy" in outcome.figures
    assert "predictions.png" in outcome.pictures

    client = tracking.client()
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert run.data.metrics["test/error"] == outcome.figures["error"]
    mlflow.set_tracking_uri(mlflow_server)
    images = torch.randint(0, 256, (7, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = mlflow.pyfunc.load_model(f"models:/figment-{name}-classifier@challenger")
    with loop.averaged_weights():
        assert isinstance(loop.learner, Classifies)
        expected = torch.softmax(loop.learner.classify(images), 1)
    torch.testing.assert_close(torch.tensor(model.predict((images / 255).numpy())), expected, rtol=1e-4, atol=1e-6)
    generator = mlflow.pyfunc.load_model(f"models:/figment-{name}@challenger")
    assert generator.predict(torch.rand(3, 6).numpy()).shape == (3, 1, 8, 8)
    files = fetch_published(tracking, f"models:/figment-{name}-classifier@challenger")
    assert files.keys() == {"networks.safetensors", "spec.json"}, "so that samples can be drawn from either"
    newest_first = [{"field_name": "creation_timestamp", "ascending": False}]
    models = client.search_logged_models([run.info.experiment_id], order_by=newest_first)
    assert [model.name for model in models] == ["model", "classifier"], "what a run is asked for is its generator"
