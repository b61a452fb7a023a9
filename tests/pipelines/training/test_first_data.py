"""Weights that the first images make: once, before the first step, and the same on every worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs
from torch import Generator, Tensor

from models.contract import Batch, InitialisesFromData, Metrics
from pipelines.data.manifest import Manifest
from pipelines.training.launch import Launch, Place
from pipelines.training.reporter import Reporter
from pipelines.training.worker import TrainingLoop
from tests.pipelines.training.pair import Pair
from tests.pipelines.training.toys import toy_dataset, toy_spec

MODEL = "semi-supervised"


def _store(folder: str) -> pafs.FileSystem:
    return pafs.SubTreeFileSystem(folder, pafs.LocalFileSystem())


def _loop(store: pafs.FileSystem, manifest: Manifest, rank: int = 0, world: int = 1) -> TrainingLoop:
    spec = toy_spec(MODEL, checkpoint_every=40)
    return TrainingLoop(Launch("n", spec, store, manifest), Place(rank, world, torch.device("cpu")), Reporter())


def _images(rank: int) -> np.ndarray:
    """Much brighter ones on the second worker."""
    return np.random.default_rng(rank).integers(200 * rank, 40 + 200 * rank, (10, 1, 8, 8), dtype=np.uint8)


def _weights(loop: TrainingLoop) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, network in loop.learner.networks().items()
        for key, tensor in network.state_dict().items()
    }


def _first_step(rank: int, folder: str, manifest: Manifest) -> dict[str, Tensor]:
    loop = _loop(_store(folder), manifest, rank, 2)
    loop._train_on(_images(rank), np.zeros(10, np.int64))
    return _weights(loop)


def test_two_workers_with_other_images_have_the_gains_of_the_first_ones(pair: Pair, tmp_path: Path) -> None:
    store = _store(str(tmp_path))
    manifest = toy_dataset(store)
    first, second = pair.run(_first_step, str(tmp_path), manifest)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    alone = _loop(store, manifest, 0, 2)
    assert isinstance(alone.learner, InitialisesFromData)
    batch = Batch(torch.from_numpy(_images(0)), torch.zeros(10, dtype=torch.int64), 0)
    alone.learner.initialise(batch, alone.state.generator)
    gains = {name: tensor for name, tensor in _weights(alone).items() if "discriminator" in name and "gain" in name}
    frozen = [name for name in gains if "hidden" in name]
    assert frozen and all(torch.equal(gains[name], first[name]) for name in frozen)
    assert all((gains[name] != 1).all() for name in frozen)


@pytest.mark.usefixtures("in_process")
def test_it_happens_before_the_first_step_alone_and_not_again_after_a_restart(
    store: pafs.FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = toy_dataset(store)
    calls: list[str] = []
    model = type(_loop(store, manifest).learner)
    initialise, step = model.initialise, model.step  # type: ignore[attr-defined]

    def initialised(self: object, batch: Batch, generator: Generator) -> None:
        calls.append(f"initialise {batch.images_seen}")
        initialise(self, batch, generator)

    def stepped(self: object, batch: Batch, generator: Generator) -> Metrics:
        calls.append(f"step {batch.images_seen}")
        return step(self, batch, generator)

    monkeypatch.setattr(model, "initialise", initialised)
    monkeypatch.setattr(model, "step", stepped)
    loop = _loop(store, manifest)
    for _ in range(2):
        loop._train_on(_images(0), np.zeros(10, np.int64))
    loop.save()
    again = _loop(store, manifest)
    again._train_on(_images(0), np.zeros(10, np.int64))
    assert calls == ["initialise 0", "step 0", "step 20", "step 40"]
