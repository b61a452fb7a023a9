"""A generator and a classifier, measured on a real Ray."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pyarrow import fs as pafs

import models
from pipelines.data.manifest import Manifest
from pipelines.data.plan import Cursor
from pipelines.errors import FigmentError
from pipelines.evaluation import measure as measuring
from pipelines.evaluation.feature_networks import feature_network
from pipelines.evaluation.measure import Settings, Subject, measure, run_subject
from pipelines.evaluation.protocol import protocol_from_text
from pipelines.objects import children, read_object, write_object
from pipelines.training.checkpoint import Bundle, TrainingState, save_bundle
from pipelines.training.history import bundle_path
from tests.models.cases import CASES
from tests.pipelines.training.toys import toy_dataset, toy_spec

pytestmark = pytest.mark.usefixtures("ray_cluster")

SHAPE = (3, 12, 12)
SETTINGS = Settings(samples=1_100, pairs=60)


def untrained(
    fs: pafs.FileSystem,
    name: str,
    model: str,
    shape: tuple[int, int, int] = SHAPE,
    images_seen: int = 0,
    seed: int = 0,
) -> str:
    """A run of a network of chance weights, with one bundle."""
    torch.manual_seed(seed)
    spec = toy_spec(model, seed=seed)
    learner = models.build(CASES[model].config, models.ImageShape(*shape))
    state = TrainingState(learner, None, torch.Generator())
    spec = replace(spec, training=replace(spec.training, ema_half_life=0))
    path = bundle_path(f"runs/{name}", images_seen, 0)
    save_bundle(fs, Bundle(path, spec, images_seen, 0, Cursor.start(1), "toy@1", shape, {}), state, rank=0)
    return f"runs/{name}"


@pytest.fixture
def data(store: pafs.FileSystem) -> Manifest:
    return toy_dataset(store, SHAPE, train=70, test=64)


def test_figures_do_not_depend_on_who_computed_what(
    store: pafs.FileSystem, data: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, run = untrained(store, "features", "residual-classifier"), untrained(store, "vae", "vae-gaussian")
    said: list[str] = []
    network = feature_network(store, features)
    first = measure(store, run_subject(store, run), data, "test", network, SETTINGS, said.append)
    assert any("1,100/1,100 samples of vae  ETA 0:00" in line for line in said)
    assert all(value == value for value in first.figures.values()) and first.figures["fid"] > 0
    assert {"fid", "kid", "is", "precision", "recall", "density", "coverage", "class_kl"} <= first.figures.keys()
    protocol = protocol_from_text(first.protocols["fid"])
    assert (protocol.samples, protocol.real, protocol.weights, protocol.run) == (1_100, 64, "last", "vae")
    assert protocol.data == f"toy@{data.version}/test" and protocol.features.startswith("residual-classifier:")

    monkeypatch.setattr(measuring, "PIECE", 1)
    said.clear()
    again = measure(store, run_subject(store, run), data, "test", network, SETTINGS, said.append)
    assert again.figures == pytest.approx(first.figures, rel=1e-5, abs=1e-9) and again.protocols == first.protocols
    assert not any("images of toy" in line for line in said), "real images were looked at once"
    assert len(children(store, f"evaluations/reference/toy@{data.version}-test")) == 1


def test_real_images_are_the_floor_and_grey_ones_the_ceiling(store: pafs.FileSystem, data: Manifest) -> None:
    network = feature_network(store, untrained(store, "features", "residual-classifier"))

    def of(kind: str, name: str) -> dict[str, float]:
        subject = Subject(kind, name)  # type: ignore[arg-type]
        return measure(store, subject, data, "test", network, SETTINGS, lambda line: None).figures

    itself, other, noise, grey = of("split", "test"), of("split", "train"), of("noise", "noise"), of("grey", "grey")
    assert itself["fid"] < 1e-6 and itself["precision"] == itself["recall"] == itself["coverage"] == 1
    assert itself["fid"] < other["fid"] < min(noise["fid"], grey["fid"])
    few = replace(SETTINGS, samples=30)
    part = measure(store, Subject("split", "train"), data, "test", network, few, lambda line: None)
    assert protocol_from_text(part.protocols["fid"]).samples == 30 and part.figures["fid"] != other["fid"]
    assert grey["recall"] == 0 and grey["is"] == pytest.approx(1) and grey["classes_covered"] == 1


def test_what_does_not_fit_is_refused_before_anything_is_computed(store: pafs.FileSystem, data: Manifest) -> None:
    features, run = untrained(store, "features", "residual-classifier"), untrained(store, "vae", "vae-gaussian")
    other = untrained(store, "other", "vae-gaussian", (3, 8, 8))
    small = untrained(store, "small", "residual-classifier", (3, 8, 8))

    def refused(words: str, subject: str = run, by: str = features, settings: Settings = SETTINGS) -> None:
        with pytest.raises(FigmentError, match=words):
            of, network = run_subject(store, subject), feature_network(store, by)
            measure(store, of, data, "test", network, settings, lambda line: None)

    refused("runs/features draws no images", subject=features)
    refused("draws images of 3x8x8, those of 'toy' are 3x12x12", subject=other)
    refused("gives no features; train one", by=run)
    refused("was trained on images of 3x8x8", by=small)
    for wrong in (Settings(samples=0), Settings(samples=-5), Settings(samples=11), Settings(pairs=11)):
        refused("want 12 at least", settings=wrong)
    refused("--seed is -1", settings=Settings(seed=-1))
    assert children(store, "evaluations") == []


def test_a_run_that_goes_on_while_it_is_measured_changes_nothing(
    store: pafs.FileSystem, data: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generator and classifier are those that were there at first, also where they are gone meanwhile."""
    run, features = untrained(store, "vae", "vae-gaussian"), untrained(store, "features", "residual-classifier")
    subject, network = run_subject(store, run), feature_network(store, features)
    first = measure(store, subject, data, "test", network, SETTINGS, lambda line: None)
    store.delete_dir("evaluations")
    for folder, model in ((run, "vae-gaussian"), (features, "residual-classifier")):
        store.delete_dir(f"{folder}/checkpoints")
        untrained(store, folder.removeprefix("runs/"), model, images_seen=300, seed=1)
    again = measure(store, subject, data, "test", network, SETTINGS, lambda line: None)
    assert again.figures == pytest.approx(first.figures, rel=1e-5, abs=1e-9) and again.protocols == first.protocols
    later = measure(store, run_subject(store, run), data, "test", network, SETTINGS, lambda line: None)
    assert later.figures["fid"] != pytest.approx(first.figures["fid"], rel=1e-3)


def test_a_damaged_reference_is_made_again(store: pafs.FileSystem, data: Manifest) -> None:
    network = feature_network(store, untrained(store, "features", "residual-classifier"))
    subject = Subject("noise", "noise")
    first = measure(store, subject, data, "test", network, SETTINGS, lambda line: None)
    (name,) = children(store, f"evaluations/reference/toy@{data.version}-test")
    path = f"evaluations/reference/toy@{data.version}-test/{name}"
    whole = read_object(store, path)
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 100, whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        write_object(store, path, damaged)
        again = measure(store, subject, data, "test", network, SETTINGS, lambda line: None)
        assert again.figures == first.figures and read_object(store, path) == whole
