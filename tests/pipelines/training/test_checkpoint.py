"""The bundle: what goes in comes out to the bit, damage is named, and half a bundle does not exist."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import fs as pafs
from torch import Generator

import models
from models.contract import Batch, ImageShape
from pipelines.data.plan import Cursor
from pipelines.errors import FigmentError
from pipelines.objects import write_object
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Bundle, TrainingState, bundle_path, load_bundle, newest_bundle, prune_bundles
from pipelines.training.ema import Ema
from tests.pipelines.training.toys import MODELS_IN_SMALL, toy_spec

SHAPE = ImageShape(1, 8, 8)
RUN = "runs/test"


def _state(model: str, seed: int) -> TrainingState:
    torch.manual_seed(seed)
    learner = models.build(MODELS_IN_SMALL[model], SHAPE)  # type: ignore[arg-type]
    return TrainingState(learner, Ema(learner.networks(), 50), Generator().manual_seed(seed))


def _train(state: TrainingState, steps: int) -> None:
    for i in range(steps):
        images = torch.randint(0, 256, (6, 1, 8, 8), generator=state.generator).to(torch.uint8)
        state.learner.step(Batch(images, torch.zeros(6, dtype=torch.long), 6 * i), state.generator)
        assert state.ema is not None
        state.ema.update(6, 6 * (i + 1))


def _bundle(model: str, images_seen: int) -> Bundle:
    cursor = Cursor.start(1).advance(images_seen)
    return Bundle(bundle_path(RUN, images_seen), toy_spec(model), images_seen, 5, cursor, "toy@1", (1, 8, 8), {})


def _save(fs: pafs.FileSystem, bundle: Bundle, state: TrainingState) -> Bundle:
    checkpoint.save_bundle(fs, bundle, state, rank=0, barrier=lambda: None)
    return load_bundle(fs, bundle.path)


@pytest.mark.parametrize("model", MODELS_IN_SMALL)
def test_everything_that_training_needs_comes_back_to_the_bit(model: str, store: pafs.FileSystem) -> None:
    ahead = _state(model, 1)
    _train(ahead, 4)
    bundle = _save(store, _bundle(model, 24), ahead)
    again = _state(model, 2)
    assert checkpoint.restore(store, bundle, again, rank=0)
    _train(ahead, 3)
    _train(again, 3)
    for a, b in zip(ahead.learner.networks().values(), again.learner.networks().values(), strict=True):
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name
    assert ahead.ema is not None and again.ema is not None
    assert all(torch.equal(t, again.ema.state[name]) for name, t in ahead.ema.state.items())
    assert torch.equal(ahead.generator.get_state(), again.generator.get_state())
    assert (bundle.spec, bundle.cursor) == (toy_spec(model), Cursor.start(1).advance(24))


def test_a_bundle_without_its_last_file_does_not_exist(store: pafs.FileSystem) -> None:
    state = _state("vae", 1)
    _save(store, _bundle("vae", 24), state)
    _save(store, _bundle("vae", 48), state)
    store.delete_file(f"{bundle_path(RUN, 48)}/bundle.json")  # as after a kill in mid-write
    newest = newest_bundle(store, RUN)
    assert newest is not None and newest.images_seen == 24
    with pytest.raises(FigmentError, match="not a complete checkpoint"):
        load_bundle(store, bundle_path(RUN, 48))


def test_a_damaged_file_is_named(store: pafs.FileSystem) -> None:
    bundle = _save(store, _bundle("vae", 24), _state("vae", 1))
    write_object(store, f"{bundle.path}/networks.safetensors", b"not what was saved")
    with pytest.raises(FigmentError, match=r"000000000024/networks\.safetensors.*sha256.*damaged"):
        checkpoint.restore(store, bundle, _state("vae", 2), rank=0)


def test_pruning_keeps_the_newest_and_clears_what_a_kill_left(store: pafs.FileSystem) -> None:
    state = _state("vae", 1)
    for images in (10, 20, 30, 40):
        _save(store, _bundle("vae", images), state)
    store.delete_file(f"{bundle_path(RUN, 20)}/bundle.json")
    prune_bundles(store, RUN, keep=2)
    left = sorted(info.base_name for info in store.get_file_info(pafs.FileSelector(f"{RUN}/checkpoints")))
    assert left == ["000000000030", "000000000040"]


def test_code_in_a_state_file_is_not_run(store: pafs.FileSystem, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path, "ran"),))  # type: ignore[return-value]

    bundle = _save(store, _bundle("vae", 24), _state("vae", 1))
    buffer = io.BytesIO()
    torch.save({"generator": Attack()}, buffer)
    write_object(store, f"{bundle.path}/rank-00000.pt", buffer.getvalue())
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.restore(store, bundle, _state("vae", 2), rank=0)
    assert not (tmp_path / "ran").exists()


def test_a_worker_beyond_the_saved_ones_gets_weights_but_keeps_its_own_randomness(store: pafs.FileSystem) -> None:
    saved = _state("dcgan", 1)
    bundle = _save(store, _bundle("dcgan", 24), saved)
    other = _state("dcgan", 2)
    randomness = other.generator.get_state()
    assert not checkpoint.restore(store, bundle, other, rank=1)
    assert torch.equal(other.generator.get_state(), randomness)
    a, b = (s.learner.networks()["generator"].state_dict() for s in (saved, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_identity_changes_with_what_decides_the_numbers_and_only_with_that() -> None:
    spec = toy_spec("dcgan")
    longer = replace(spec, training=replace(spec.training, images=10**6, checkpoint_every=5))
    wider = replace(spec, cluster=replace(spec.cluster, workers=4))
    assert spec.identity == longer.identity == wider.identity
    reseeded = replace(spec, training=replace(spec.training, seed=9))
    faster = replace(spec, model=replace(spec.model, learning_rate=0.1))
    assert len({spec.identity, reseeded.identity, faster.identity, toy_spec("vae").identity}) == 4
