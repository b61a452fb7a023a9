"""The loop on a real stream: resume equals uninterrupted to the bit, for every model; bad numbers stop it in time."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs
from safetensors.torch import load as load_safetensors

from models.contract import Batch, Evaluates, Metrics
from pipelines.config import RunSpec
from pipelines.data.stream import evaluation_batches
from pipelines.errors import FigmentError
from pipelines.objects import children, exists, read_json, read_object, write_json, write_object
from pipelines.training import worker
from pipelines.training.checkpoint import Bundle
from pipelines.training.gradients import NonFiniteError
from pipelines.training.history import newest_bundle
from pipelines.training.launch import Launch, Place, TakenOverError
from pipelines.training.reporter import Reporter, TrackedReporter
from pipelines.training.worker import TrainingLoop, derived_seed
from tests.models.cases import CASES
from tests.pipelines.data.shards import write_shard
from tests.pipelines.training.toys import toy_dataset, toy_spec

HERE = Place(rank=0, world_size=1, device=torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("in_process")


def _loop(fs: pafs.FileSystem, spec: RunSpec, name: str, shape: tuple[int, int, int] = (1, 8, 8)) -> TrainingLoop:
    return TrainingLoop(Launch(name, spec, fs, toy_dataset(fs, shape)), HERE, Reporter())


def _newest(fs: pafs.FileSystem, name: str) -> Bundle:
    found, damaged = newest_bundle(fs, f"runs/{name}")
    assert found is not None and not damaged
    return found.bundle


def _files(fs: pafs.FileSystem, name: str) -> dict[str, bytes]:
    bundle = _newest(fs, name)
    return {file: read_object(fs, f"{bundle.path}/{file}") for file in bundle.files}


class Killed(Exception):
    """Stands for a kill: raised from inside the loop, after which nothing of it is used."""


@pytest.mark.parametrize("model", CASES)
def test_a_run_that_is_killed_and_repeated_equals_an_uninterrupted_one_to_the_bit(
    model: str, store: pafs.FileSystem
) -> None:
    spec, shape = toy_spec(model, images=240, checkpoint_every=120), astuple(CASES[model].shape)
    _loop(store, spec, "whole", shape).run()

    killed = _loop(store, spec, "killed", shape)
    train_on = killed._train_on

    def until_killed(*arrays: Any) -> dict[str, torch.Tensor]:
        if killed.images_seen == 180:  # 60 images after the checkpoint, in the middle of the third epoch of 70
            raise Killed
        return train_on(*arrays)

    killed._train_on = until_killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        killed.run()
    resumed = _loop(store, spec, "killed", shape)
    assert resumed.images_seen == 120
    resumed.run()

    of_whole, of_killed = _newest(store, "whole"), _newest(store, "killed")
    assert (of_whole.step, of_whole.cursor) == (of_killed.step, of_killed.cursor)
    assert of_whole.step == 240 // spec.training.batch_size
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

    def poisoned(*arrays: Any) -> dict[str, torch.Tensor]:
        if loop.images_seen == 100:
            with torch.no_grad():
                next(iter(loop.learner.networks()["decoder"].parameters())).fill_(float("nan"))
        return train_on(*arrays)

    loop._train_on = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"step 6 \(100 images seen\).*NaN"):
        loop.run()
    bundle = _newest(store, "diverged")
    assert bundle.images_seen == 60
    weights = load_safetensors(read_object(store, f"{bundle.path}/networks.safetensors"))
    assert all(torch.isfinite(t).all() for t in weights.values())


def test_evaluation_is_the_mean_over_every_held_out_image(store: pafs.FileSystem) -> None:
    manifest = toy_dataset(store, test=43)
    loop = TrainingLoop(Launch("v", toy_spec("vae"), store, manifest), HERE, Reporter())
    with torch.no_grad():  # the weights are no longer their average, and the average is what is evaluated
        for parameter in loop.learner.networks()["decoder"].parameters():
            parameter.add_(0.1)
    got = loop.evaluate()
    with evaluation_batches(store, manifest, "test", world_size=1, rank=0, batch_size=43) as batches:
        images, labels, _ = next(batches)
    assert isinstance(loop.learner, Evaluates)
    generator = torch.Generator().manual_seed(derived_seed(loop.spec.training.seed, "evaluation"))
    assert loop.state.ema is not None
    with loop.state.ema.swapped_in(), torch.no_grad():
        values = loop.learner.evaluate(Batch(torch.from_numpy(images), torch.from_numpy(labels), 0), generator)
    assert len(values["elbo"]) == 43
    for name, value in values.items():
        assert got[name] == pytest.approx(float(value.double().mean()), rel=1e-6), name


def test_evaluation_over_workers_is_the_mean_over_every_image_however_unevenly_they_share_them(
    store: pafs.FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image and three workers: two of them have none, the first among them."""
    for rows, world in ((43, 2), (1, 3), (2, 3)):
        manifest = toy_dataset(store, test=rows)
        parts: list[tuple[dict[str, float], int]] = []

        def gather(own: tuple[dict[str, float], int], parts: list = parts) -> list:
            return [*parts, own]

        monkeypatch.setattr(worker, "gather", gather)
        values: list[float] = []
        for rank in reversed(range(world)):
            place = Place(rank, world, torch.device("cpu"))
            loop = TrainingLoop(Launch("v", toy_spec("vae"), store, manifest), place, Reporter())
            share: list[float] = []
            evaluate = loop.learner.evaluate  # type: ignore[attr-defined]

            def kept(batch: Batch, generator: torch.Generator, share: list = share, evaluate: Any = evaluate) -> dict:
                found = evaluate(batch, generator)
                share.extend(found["elbo"].tolist())
                return found

            loop.learner.evaluate = kept  # type: ignore[attr-defined]
            got = loop.evaluate()
            values += share
            parts.append(({"elbo": sum(share)} if share else {}, len(share)))
        assert len(values) == rows
        assert got["elbo"] == pytest.approx(sum(values) / rows, rel=1e-6)


class TwiceCritic:
    """Two updates of one weight in a step: the second must start from the weight that the first left."""

    def __init__(self) -> None:
        self.net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.net.weight, 1.0)
        self.sgd = torch.optim.SGD(self.net.parameters(), lr=1.0)

    def step(self, batch: Batch, generator: torch.Generator) -> Metrics:
        seen = []
        for _ in range(2):
            self.sgd.zero_grad()
            score = self.net(torch.full((1, 1), 2.0)).sum()
            seen.append(score.detach())
            score.backward()
            self.sgd.step()
        return {"first": seen[0], "second": seen[1]}


def test_a_bundle_of_other_data_or_settings_is_not_gone_on_from(store: pafs.FileSystem) -> None:
    spec = toy_spec("vae", images=60)
    _loop(store, spec, "other").run()
    with pytest.raises(FigmentError, match=r"other settings or of another data set version"):
        _loop(store, replace(spec, training=replace(spec.training, seed=9)), "other")
    with pytest.raises(FigmentError, match=r"other settings or of another data set version"):
        TrainingLoop(Launch("other", spec, store, toy_dataset(store, train=50)), HERE, Reporter())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_second_forward_pass_of_a_step_uses_the_updated_weights_in_the_precision_asked_for(
    precision: Any, dtype: torch.dtype, store: pafs.FileSystem
) -> None:
    spec = toy_spec("vae")
    loop = _loop(store, replace(spec, training=replace(spec.training, precision=precision)), "twice")
    loop.learner = TwiceCritic()  # type: ignore[assignment]
    loop.state = replace(loop.state, ema=None)
    got = loop._train_on(np.zeros((20, 1, 8, 8), np.uint8), np.zeros(20, np.int64))
    assert got["first"].dtype == dtype, "autocast is on for bf16 alone"
    assert (float(got["first"]), float(got["second"])) == (2.0, -2.0)  # w = 1, then w = 1 - 2


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_what_is_wrong_with_the_damaged_one(
    store: pafs.FileSystem,
) -> None:
    spec = toy_spec("vae", images=120, checkpoint_every=60)
    _loop(store, spec, "whole").run()
    _loop(store, spec, "damaged").run()
    damaged = _newest(store, "damaged").path
    write_object(store, f"{damaged}/rank-00000.pt", b"")
    said: list[str] = []
    again = TrainingLoop(Launch("damaged", spec, store, toy_dataset(store)), HERE, Saying(said))
    assert again.images_seen == 60
    assert any("000000000120" in line and "rank-00000.pt" in line and "damaged" in line for line in said)
    assert {"damaged.json"} == {n for n in children(store, damaged) if n.endswith(".json")}, "set aside, not counted"
    again.run()
    assert _files(store, "whole")["networks.safetensors"] == _files(store, "damaged")["networks.safetensors"]


class Saying(Reporter):
    def __init__(self, said: list[str]) -> None:
        self._said = said

    def say(self, text: str) -> None:
        self._said.append(text)


def test_a_run_resumed_on_another_kind_of_device_says_so_and_draws_new_noise(store: pafs.FileSystem) -> None:
    spec = toy_spec("vae", images=60)
    first = _loop(store, spec, "moved")
    first._train_on(np.zeros((20, 1, 8, 8), np.uint8), np.zeros(20, np.int64))
    first.state = replace(first.state, generator=GpuLike())
    first.save()
    said: list[str] = []
    moved = TrainingLoop(Launch("moved", spec, store, toy_dataset(store)), HERE, Saying(said))
    assert any("another kind of device" in line and "from here on" in line for line in said)
    assert moved.state.generator.initial_seed() == derived_seed(spec.training.seed, "step 20", 0), "not the run's first"
    assert torch.initial_seed() == derived_seed(spec.training.seed, "torch 20", 0)
    moved.run()


class GpuLike(torch.Generator):
    """Its state has the size of a GPU's."""

    def get_state(self) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)


def test_a_launch_that_was_taken_over_writes_no_checkpoint_any_more(store: pafs.FileSystem) -> None:
    launch = Launch("taken", toy_spec("vae", images=60), store, toy_dataset(store), fence=1, token="mine")
    loop = TrainingLoop(launch, HERE, Reporter())
    record = {"fence": 1, "holder": "x", "token": "mine", "renewals": 0, "ttl_s": 1.0, "released": False}
    write_json(store, launch.lease, record)
    loop.save()
    write_json(store, launch.lease, {**record, "fence": 2, "token": "another's"})
    with pytest.raises(TakenOverError, match="'taken' was taken over by another launch"):
        loop.run()
    write_json(store, launch.lease, record)
    launch.check_owner()
    store.delete_file(launch.lease)
    with pytest.raises(TakenOverError, match=r"lease.json was removed"):
        launch.check_owner()
    assert children(store, f"{launch.folder}/checkpoints") == ["000000000000-00001"], "the one from before"


def test_a_run_of_a_classifier_shows_what_it_says_of_held_out_images(store: pafs.FileSystem) -> None:
    """It draws no samples: none are shown, compared or expected to be."""
    launch = Launch("told", toy_spec("residual-classifier", images=120), store, toy_dataset(store, (3, 12, 12)))
    reporter = TrackedReporter(launch, HERE.device, None, {}, lambda line: None)
    loop = TrainingLoop(launch, HERE, reporter)
    outcome = reporter.finish(loop, loop.run())
    assert set(outcome.pictures) == {"predictions.png", "training.mp4", "training.gif"}
    assert outcome.grid == "predictions.png" and outcome.figures.keys() == {"error", "cross_entropy"}
    assert len(children(store, "runs/told/frames")) >= 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_without_the_label_that_the_model_needs_ends_the_run_in_a_sentence(
    split: str, store: pafs.FileSystem
) -> None:
    toy = toy_dataset(store, (3, 12, 12))
    images = np.zeros((25, 3, 12, 12), np.uint8)
    labels = np.full(25, -1, np.int32)
    unlabelled = (write_shard(store, toy.root, images, labels),)
    manifest = replace(toy, splits={**toy.splits, split: unlabelled})
    launch = Launch("half", toy_spec("residual-classifier", images=120), store, manifest)
    with pytest.raises(FigmentError, match=rf"split '{split}' of data set 'toy' has an image with label -1, .* 0 … 1:"):
        TrainingLoop(launch, HERE, Reporter()).run()


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


@pytest.mark.parametrize(
    ("shape", "train", "test", "figures"),
    [
        ((1, 64, 16), 30, 30, {"elbo", "swd", "diversity"}),  # a pyramid of the shorter side
        ((1, 8, 8), 30, 2, {"elbo", "swd", "diversity"}),  # the fewest that can be compared
        ((3, 7, 9), 30, 30, {"elbo", "swd", "diversity"}),  # as small as a patch
    ],
)
def test_images_of_any_shape_and_few_held_out_ones_end_in_figures(
    shape: tuple[int, int, int], train: int, test: int, figures: set[str], store: pafs.FileSystem
) -> None:
    launch = Launch("odd", toy_spec("vae", images=40), store, toy_dataset(store, shape, train, test))
    reporter = TrackedReporter(launch, HERE.device, None, {}, lambda line: None)
    loop = TrainingLoop(launch, HERE, reporter)
    outcome = reporter.finish(loop, loop.run())
    assert outcome.figures.keys() >= figures
    assert all(np.isfinite(value) for value in outcome.figures.values())


def test_what_a_kill_left_of_a_frame_does_not_end_up_in_the_animation(store: pafs.FileSystem) -> None:
    launch = Launch("cut", toy_spec("vae", images=40), store, toy_dataset(store))
    reporter = TrackedReporter(launch, HERE.device, None, {}, lambda line: None)
    loop = TrainingLoop(launch, HERE, reporter)
    figures = loop.run()
    frames = f"{launch.folder}/frames"
    cut_off = read_object(store, f"{frames}/{children(store, frames)[0]}")[:50]
    killed = (
        "import os, signal, sys\nfrom infra.storage import open_storage\nfrom pipelines.objects import write_object\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_object(open_storage(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3]))\n"
    )
    where = [store.base_path, f"{frames}/000000000020.png", cut_off.hex()]
    done = subprocess.run([sys.executable, "-c", killed, *where], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(store.get_file_info(pafs.FileSelector(frames))) == len(children(store, frames)) + 1, "it left something"
    assert reporter.finish(loop, figures).images_seen == 40


def test_a_spec_that_cannot_run_is_refused_in_one_sentence() -> None:
    spec = toy_spec("vae", workers=3)
    with pytest.raises(FigmentError, match=r"--training.batch-size 20.*--cluster.workers 3"):
        spec.check()
    with pytest.raises(FigmentError, match=r"--training.images is 0"):
        replace(spec, training=replace(spec.training, images=0)).check()
