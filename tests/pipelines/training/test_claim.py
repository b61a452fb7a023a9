"""What a run's name belongs to: settings, the data set version that it began with, its outcome."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from pyarrow import fs as pafs

from pipelines.config import RunSpec
from pipelines.data.manifest import Manifest, save_manifest
from pipelines.errors import FigmentError
from pipelines.objects import read_json, write_json, write_object
from pipelines.training.claim import claim, data_of, finished
from pipelines.training.reporter import Outcome
from tests.pipelines.training.toys import DATASET, toy_dataset, toy_spec


def _spec(dataset: str = DATASET, images: int = 60) -> RunSpec:
    spec = toy_spec("vae", images=images)
    return replace(spec, data=replace(spec.data, dataset=dataset))


def _newer(fs: pafs.FileSystem, manifest: Manifest) -> Manifest:
    """Another version of the same data set: fewer held-out images."""
    splits = {"train": manifest.splits["train"], "test": manifest.splits["test"][:1]}
    newer = replace(manifest, splits=splits, created_at="2026-02-02T00:00:00+00:00")
    save_manifest(fs, newer)
    return newer


def _finish(fs: pafs.FileSystem, name: str, images: int) -> None:
    outcome = Outcome(name, images, 1.0, 1.0, {}, "", "", f"runs/{name}", [], "", "", None)
    write_json(fs, f"runs/{name}/outcome.json", asdict(outcome))


def test_a_run_goes_on_with_the_version_that_it_began_with_and_says_that_there_is_a_newer_one(
    store: pafs.FileSystem,
) -> None:
    began = toy_dataset(store)
    said: list[str] = []
    assert finished(store, "n", _spec()) is None, "the name is free"
    for _ in ("before", "after"):
        assert data_of(store, "n", _spec(), said.append).version == began.version
        claim(store, "n", _spec(), began)
    assert not said, "there is no newer version yet"
    newer = _newer(store, began)
    assert data_of(store, "other", _spec(), said.append).version == newer.version
    assert not said

    assert finished(store, "n", _spec()) is None, "the same command is not refused"
    assert data_of(store, "n", _spec(), said.append).version == began.version
    (news,) = said
    assert newer.version in news and began.version in news


def test_the_version_can_be_named_and_no_other_one_is_taken(store: pafs.FileSystem) -> None:
    began = toy_dataset(store)
    newer = _newer(store, began)
    claim(store, "n", _spec(), began)
    assert finished(store, "n", _spec(f"{DATASET}@{began.version[:6]}")) is None
    with pytest.raises(FigmentError, match=rf"data set version {DATASET}@{began.version} -> {DATASET}@{newer.version}"):
        finished(store, "n", _spec(f"{DATASET}@{newer.version}"))
    with pytest.raises(FigmentError, match=r"other settings \(training\.seed 3 -> 4\)"):
        finished(store, "n", replace(_spec(), training=replace(_spec().training, seed=4)))
    with pytest.raises(FigmentError, match=r"data.dataset toy -> to"):
        finished(store, "n", _spec("to"))


def test_a_finished_run_is_shown_whatever_became_of_its_data_and_a_longer_one_names_what_is_gone(
    store: pafs.FileSystem,
) -> None:
    began = toy_dataset(store)
    claim(store, "n", _spec(), began)
    _finish(store, "n", 60)
    store.delete_dir("datasets")
    outcome = finished(store, "n", _spec())
    assert outcome is not None and outcome.images_seen == 60
    assert finished(store, "n", _spec(images=61)) is None
    with pytest.raises(FigmentError, match=rf"no complete data set '{DATASET}@{began.version}'"):
        data_of(store, "n", _spec(images=61), lambda line: None)


def test_a_run_of_an_earlier_version_goes_on_whatever_hash_it_stored(store: pafs.FileSystem) -> None:
    """0.1.0 hashed the version that was named with the settings, and knew fewer of them."""
    began = toy_dataset(store)
    spec = _spec(f"{DATASET}@{began.version}")
    claim(store, "n", spec, began)
    known = read_json(store, "runs/n/run.json")
    del known["spec"]["training"]["deterministic"]
    write_json(store, "runs/n/run.json", {**known, "identity": "0123456789abcdef"})
    assert finished(store, "n", spec) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"identity": "x"'])
def test_a_damaged_claim_is_named(body: bytes, store: pafs.FileSystem) -> None:
    write_object(store, "runs/n/run.json", body)
    with pytest.raises(FigmentError, match=r"runs/n/run.json cannot be read .* choose another --name"):
        finished(store, "n", _spec())


def test_a_claim_of_a_version_of_figment_that_had_other_settings_is_compared_all_the_same(
    store: pafs.FileSystem,
) -> None:
    claim(store, "n", _spec(), toy_dataset(store))
    known = read_json(store, "runs/n/run.json")
    del known["spec"]["visuals"]
    known["spec"]["training"]["schedule"] = {"warmup": 5}
    write_json(store, "runs/n/run.json", {**known, "identity": "of that version"})
    with pytest.raises(FigmentError, match=r"training.schedule \{'warmup': 5\} -> None; visuals None -> \{"):
        finished(store, "n", _spec())
