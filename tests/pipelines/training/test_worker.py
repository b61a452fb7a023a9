"""The loop on a real stream: resume equals uninterrupted to the bit, for every model; bad numbers stop it in time."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs
from safetensors.torch import load as load_safetensors

from models import MODELS
from models.contract import Batch, Evaluates
from pipelines.config import RunSpec
from pipelines.data.stream import evaluation_batches
from pipelines.errors import FigmentError
from pipelines.objects import exists, read_json, read_object
from pipelines.training.checkpoint import newest_bundle
from pipelines.training.gradients import NonFiniteError
from pipelines.training.reporter import Reporter, TrackedReporter
from pipelines.training.worker import Launch, Place, TrainingLoop, derived_seed
from tests.pipelines.training.toys import MODELS_IN_SMALL, toy_dataset, toy_spec

HERE = Place(rank=0, world_size=1, device=torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("ray_cluster")


def _loop(fs: pafs.FileSystem, spec: RunSpec, name: str) -> TrainingLoop:
    return TrainingLoop(Launch(name, spec, fs, toy_dataset(fs)), HERE, Reporter())


def _files(fs: pafs.FileSystem, name: str) -> dict[str, bytes]:
    bundle = newest_bundle(fs, f"runs/{name}")
    assert bundle is not None
    return {file: read_object(fs, f"{bundle.path}/{file}") for file in [*bundle.files, "rank-00000.pt"]}


class Killed(Exception):
    """Stands for a kill: raised from inside the loop, after which nothing of it is used."""


@pytest.mark.parametrize("model", MODELS)
def test_a_run_that_is_killed_and_repeated_equals_an_uninterrupted_one_to_the_bit(
    model: str, store: pafs.FileSystem
) -> None:
    spec = toy_spec(model, images=240, checkpoint_every=120)
    _loop(store, spec, "whole").run()

    killed = _loop(store, spec, "killed")
    train_on = killed._train_on

    def until_killed(images: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
        if killed.images_seen == 180:  # 60 images after the checkpoint, in the middle of the third epoch of 70
            raise Killed
        return train_on(images, labels)

    killed._train_on = until_killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        killed.run()
    resumed = _loop(store, spec, "killed")
    assert resumed.images_seen == 120
    resumed.run()

    whole, again = _files(store, "whole"), _files(store, "killed")
    assert whole.keys() == again.keys()
    for name in ("networks.safetensors", "ema.safetensors"):
        assert whole[name] == again[name]
    for name in ("optimizers.pt", "rank-00000.pt"):
        _assert_same(*(torch.load(io.BytesIO(files[name]), weights_only=True) for files in (whole, again)))


def _assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys()
        for key in a:
            _assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert isinstance(b, list | tuple) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
    else:
        assert a == b


def test_the_checkpoint_schedule_does_not_change_the_numbers(store: pafs.FileSystem) -> None:
    often, seldom = (toy_spec("dcgan", images=120, checkpoint_every=every) for every in (20, 10**9))
    _loop(store, often, "often").run()
    _loop(store, seldom, "seldom").run()
    assert _files(store, "often")["networks.safetensors"] == _files(store, "seldom")["networks.safetensors"]


def test_pictures_and_tracking_do_not_change_the_numbers(store: pafs.FileSystem) -> None:
    spec = toy_spec("vae", images=120)
    _loop(store, spec, "plain").run()
    launch = Launch("watched", spec, store, toy_dataset(store))
    TrainingLoop(launch, HERE, TrackedReporter(launch, HERE.device, None, {}, lambda line: None)).run()
    assert _files(store, "plain")["networks.safetensors"] == _files(store, "watched")["networks.safetensors"]


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(store: pafs.FileSystem) -> None:
    spec = toy_spec("vae", images=240, checkpoint_every=60)
    loop = _loop(store, spec, "diverged")
    train_on = loop._train_on

    def poisoned(images: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
        if loop.images_seen == 100:
            with torch.no_grad():
                next(iter(loop.learner.networks()["decoder"].parameters())).fill_(float("nan"))
        return train_on(images, labels)

    loop._train_on = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"step 6 \(100 images seen\).*NaN"):
        loop.run()
    bundle = newest_bundle(store, "runs/diverged")
    assert bundle is not None and bundle.images_seen == 60
    weights = load_safetensors(read_object(store, f"{bundle.path}/networks.safetensors"))
    assert all(torch.isfinite(t).all() for t in weights.values())


def test_evaluation_is_the_mean_over_every_held_out_image(store: pafs.FileSystem) -> None:
    manifest = toy_dataset(store, test=43)
    loop = TrainingLoop(Launch("v", toy_spec("vae"), store, manifest), HERE, Reporter())
    got = loop.evaluate()
    with evaluation_batches(store, manifest, "test", world_size=1, rank=0, batch_size=43) as batches:
        images, labels = next(batches)
    assert isinstance(loop.learner, Evaluates)
    generator = torch.Generator().manual_seed(derived_seed(loop.spec.training.seed, "evaluation"))
    with loop.averaged_weights(), torch.no_grad():
        values = loop.learner.evaluate(Batch(torch.from_numpy(images), torch.from_numpy(labels), 0), generator)
    assert len(values["elbo"]) == 43
    for name, value in values.items():
        assert got[name] == pytest.approx(float(value.double().mean()), rel=1e-6), name


def test_a_finished_run_leaves_what_a_person_looks_at(store: pafs.FileSystem) -> None:
    spec = toy_spec("vae", images=120)
    launch = Launch("seen", spec, store, toy_dataset(store))
    said: list[str] = []
    reporter = TrackedReporter(launch, HERE.device, None, {}, said.append)
    loop = TrainingLoop(launch, HERE, reporter)
    outcome = reporter.finish(loop, loop.run())
    assert {"samples.png", "reconstructions.png", "traversals.png", "training.mp4", "training.gif"} == set(
        outcome.pictures
    )
    assert all(exists(store, f"runs/seen/{name}") for name in outcome.pictures)
    assert {"elbo", "swd", "diversity"} <= outcome.figures.keys()
    assert read_json(store, "runs/seen/outcome.json")["images_seen"] == 120
    assert any("img/s" in line and "stall" in line and "ETA" in line for line in said)


def test_a_spec_that_cannot_run_is_refused_in_one_sentence() -> None:
    spec = toy_spec("vae", workers=3)
    with pytest.raises(FigmentError, match=r"--training.batch-size 20.*--cluster.workers 3"):
        spec.check()
    with pytest.raises(FigmentError, match=r"--training.images is 0"):
        replace(spec, training=replace(spec.training, images=0)).check()


def test_every_registered_model_has_a_small_config_here() -> None:
    assert MODELS_IN_SMALL.keys() == MODELS.keys(), "a new model joins the resume test by a config in toys.py"
