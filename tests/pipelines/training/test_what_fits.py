"""A model that does not fit its data, or a worker's share of a batch, is refused in a sentence before anything starts.

No Ray runs here: what is refused is refused before the cluster is asked for anything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pyarrow import fs as pafs

import models
from models import MODELS
from models.contract import Asks, Batch, InitialisesFromData, LimitsShare
from pipelines.config import RunSpec
from pipelines.data.manifest import Manifest, save_manifest
from pipelines.errors import FigmentError
from pipelines.objects import exists
from pipelines.training.trainer import _check_fits, launch
from tests.models.cases import CASES, Case
from tests.pipelines.training.toys import toy_dataset, toy_spec


def refused(store: pafs.FileSystem, spec: RunSpec) -> str:
    with pytest.raises(FigmentError) as refusal:
        launch(spec, store, name="early", tracking=None, tags={}, say=lambda line: None)
    assert not exists(store, "runs/early")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def dataset_of(store: pafs.FileSystem, case: Case, *names: str) -> Manifest:
    shape = case.shape
    toy = toy_dataset(store, (shape.channels, shape.height, shape.width))
    manifest = replace(toy, label_names=names, created_at="2026-01-02T00:00:00+00:00")  # the newest is taken
    save_manifest(store, manifest)
    return manifest


def spec_of(model: str, batch_size: int = 20, workers: int = 1, **settings: Any) -> RunSpec:
    spec = toy_spec(model, workers=workers)
    training = replace(spec.training, batch_size=batch_size)
    return replace(spec, training=training, model=replace(spec.model, **settings))  # type: ignore[type-var]


WITH_CLASSES = [name for name, case in CASES.items() if getattr(case.config, "classes", 0)]


@pytest.mark.parametrize("model", WITH_CLASSES)
def test_a_model_of_two_classes_is_refused_without_labels_and_with_three(model: str, store: pafs.FileSystem) -> None:
    for names, has in (((), "has no labels"), (("one", "two", "three"), "has 3")):
        manifest = dataset_of(store, CASES[model], *names)
        expected = f"the model needs labels 0 … 1 (2 classes), but data set 'toy@{manifest.version}' {has}; choose"
        assert refused(store, spec_of(model)).startswith(expected)
        store.delete_dir("datasets")
    _check_fits(spec_of(model), dataset_of(store, CASES[model], "left", "top"))


def test_every_model_that_asks_for_labels_is_among_these() -> None:
    asking = {
        models.name_of(case.config)
        for case in CASES.values()
        if isinstance(learner := models.build(case.config, case.shape), Asks) and learner.needs().classes
    }
    assert asking == {models.name_of(CASES[name].config) for name in WITH_CLASSES} == MODELS.keys() - {"vae", "infogan"}


@pytest.mark.parametrize("model", CASES)
def test_a_labelled_subset_is_refused_where_nothing_learns_from_it(model: str, store: pafs.FileSystem) -> None:
    case = CASES[model]
    spec, manifest = spec_of(model), dataset_of(store, case, "left", "top")
    spec = replace(spec, data=replace(spec.data, labels_per_class=3))
    if model.startswith("semi-supervised"):
        _check_fits(spec, manifest)
    else:
        words = f"model {models.name_of(case.config)!r} learns from none of those; leave it out"
        assert refused(store, spec).endswith(words)


# model, settings, batch size, workers, words that say why
SHARES: list[tuple[str, dict[str, Any], int, int, str]] = [
    ("dcgan", {"discriminator_steps": 3}, 20, 2, "10 image(s), which discriminator_steps 3 cannot divide evenly"),
    ("dcgan", {"discriminator_norm": "virtual"}, 40, 2, "20 image(s), too few for a virtual_reference of 32"),
    ("dcgan", {}, 2, 2, "nothing to normalise by where an update sees one image alone, of a worker's share of 1"),
    ("dcgan", {"discriminator_steps": 5}, 5, 1, "one image alone, of a worker's share of 5"),
    ("dcgan", {"generator_norm": "virtual", "minibatch_kernels": 2}, 1, 1, "no neighbours to compare with"),
    ("semi-supervised", {}, 6, 2, "3 image(s), and D and G halve a share of 4 at least"),
    ("infogan", {}, 2, 2, "1 image(s), and batch norm needs 2 at least"),
    ("improved-gan-imagenet", {}, 2, 2, "1 image(s), and minibatch features compare 2 at least"),
]
FEWEST: list[tuple[str, dict[str, Any], int]] = [
    ("dcgan", {"discriminator_steps": 3}, 6),
    ("dcgan", {"discriminator_norm": "virtual", "virtual_reference": 4}, 4),
    ("dcgan", {}, 2),
    ("dcgan", {"generator_norm": "virtual"}, 1),
    ("dcgan", {"generator_norm": "virtual", "minibatch_kernels": 2}, 2),
    ("semi-supervised", {}, 4),
    ("semi-supervised-convolutional", {}, 4),
    ("infogan", {}, 2),
    ("improved-gan-imagenet", {}, 2),
]


@pytest.mark.parametrize(("model", "settings", "batch_size", "workers", "words"), SHARES)
def test_a_share_that_a_model_cannot_work_with_is_refused_with_the_reason(
    model: str, settings: dict[str, Any], batch_size: int, workers: int, words: str, store: pafs.FileSystem
) -> None:
    dataset_of(store, CASES[model], "left", "top")
    sentence = refused(store, spec_of(model, batch_size, workers, **settings))
    assert sentence.startswith(f"--training.batch-size {batch_size} on {workers} worker(s) does not fit the model: ")
    assert words in sentence


@pytest.mark.parametrize(("model", "settings", "images"), FEWEST)
def test_the_smallest_share_that_is_not_refused_trains(
    model: str, settings: dict[str, Any], images: int, store: pafs.FileSystem
) -> None:
    case = CASES[model]
    spec, shape = spec_of(model, images, **settings), case.shape
    _check_fits(spec, dataset_of(store, case, "left", "top"))
    torch.manual_seed(0)
    learner, generator = models.build(spec.model, shape), torch.Generator().manual_seed(0)
    assert isinstance(learner, LimitsShare)
    x = torch.randint(0, 256, (images, shape.channels, shape.height, shape.width), generator=generator)
    batch = Batch(x.to(torch.uint8), torch.arange(images) % 2, 0)
    if isinstance(learner, InitialisesFromData):
        learner.initialise(batch, generator)
    assert all(value.isfinite() for value in learner.step(batch, generator).values())
    if images > 1:
        with pytest.raises(ValueError, match="share of"):
            learner.check_share(images - 1)
