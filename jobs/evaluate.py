"""Measures samples the way papers do, and says with every number how.

    python -m jobs.evaluate train-features cifar10                a classifier whose features samples are measured by
    python -m jobs.evaluate run runs/dcgan-cifar10 --features runs/features-cifar10
    python -m jobs.evaluate data cifar10 train --features runs/features-cifar10     what real images score
    python -m jobs.evaluate data cifar10 noise --features runs/features-cifar10     … and noise or grey: the ceiling
    python -m jobs.evaluate compare runs/a runs/b runs/c

Figures are kept beside the run, with the protocol of each, and stand on its page in MLflow as tags. A run may be
measured while it is trained: its newest checkpoint is, and its status stays what it is.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from infra.storage import default_store, open_storage
from jobs.entry import connect_ray, run_job
from pipelines.errors import FigmentError


@dataclass(frozen=True)
class Measuring:
    """What all measurements can be told."""

    features: str
    """Folder of a run (or checkpoint) of a classifier in the storage, runs/NAME: its features are compared."""
    samples: int = 10_000
    """Images drawn."""
    pairs: int = 10_000
    """Images of either set that are compared pair by pair, at most: precision and recall cost its square."""
    seed: int = 0
    """Of the latents."""
    store: str | None = None
    """Storage url (s3://bucket/prefix, file:///folder); by default FIGMENT_STORE."""
    tracking: str | None = None
    """MLflow tracking URI, or "none"; by default MLFLOW_TRACKING_URI."""


@dataclass(frozen=True)
class OfRun:
    """The samples of a run, against the held-out images of its data set."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run in the storage: runs/NAME."""
    how: Annotated[Measuring, tyro.conf.arg(name="")]
    split: str | None = None
    """Split of real images; by default the run's evaluation split."""


@dataclass(frozen=True)
class OfData:
    """Real images of another split, noise or grey images in place of samples: what a number means."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """Name of the data set, or NAME@VERSION."""
    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPLIT|noise|grey")]
    """What takes the place of samples."""
    how: Annotated[Measuring, tyro.conf.arg(name="")]
    split: str = "test"
    """Split that they are compared with."""


@dataclass(frozen=True)
class Compare:
    """One table of what was measured of several runs; refused where two figures were not measured alike."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN …")]
    """Folders in the storage: runs/NAME."""
    store: str | None = None
    """Storage url; by default FIGMENT_STORE."""


@dataclass(frozen=True)
class TrainFeatures:
    """Train the classifier of a data set: `jobs.train features-DATASET` under the name features-DATASET."""

    dataset: Annotated[Literal["cifar10", "mnist"], tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """Data set that has a recipe for it; for others see docs/models/residual-classifier.md."""


Command = (
    Annotated[OfRun, tyro.conf.subcommand("run")]
    | Annotated[OfData, tyro.conf.subcommand("data")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[TrainFeatures, tyro.conf.subcommand("train-features")]
)


def main() -> None:
    command: Command = tyro.cli(Command, prog="python -m jobs.evaluate", description=__doc__, args=sys.argv[1:])
    match command:
        case OfRun():
            of_run(command)
        case OfData():
            of_data(command)
        case Compare():
            compare(command)
        case TrainFeatures(dataset):
            from jobs import train

            sys.argv = ["jobs.train", f"features-{dataset}", "--ingest"]
            train.main()


def of_run(command: OfRun) -> None:
    from pipelines.data.manifest import load_manifest
    from pipelines.evaluation.feature_networks import feature_network
    from pipelines.evaluation.measure import Settings, measure, run_subject
    from pipelines.evaluation.results import keep, result_of
    from pipelines.objects import exists, read_json, read_object

    how, fs = command.how, open_storage(_store(command.how.store))
    folder = _folder(command.run)
    if not exists(fs, f"{folder}/run.json"):
        raise FigmentError(f"there is no run {folder} in the storage: name one as runs/NAME")
    subject = run_subject(fs, folder)
    assert subject.drawn_by is not None
    spec, seen = subject.drawn_by.spec, subject.drawn_by.images_seen
    manifest = load_manifest(fs, read_json(fs, f"{folder}/run.json")["dataset"])
    network = feature_network(fs, _folder(how.features))
    connect_ray()
    settings = Settings(how.samples, how.seed, how.pairs)
    measured = measure(fs, subject, manifest, command.split or spec.data.eval_split, network, settings, _say)
    path = keep(fs, folder, result_of(subject.name, spec, seen, measured))
    uri = how.tracking or os.environ.get("MLFLOW_TRACKING_URI", "none")
    if uri != "none":
        from pipelines.tracking import Tracking, add_to_run

        # A figure and its protocol in one tag: two of them could come to be of two measurements.
        tags = {f"eval.{name}": f"{value:.6g} {measured.protocols[name]}" for name, value in measured.figures.items()}
        files = {f"evaluations/{path.rpartition('/')[2]}": read_object(fs, path)}
        add_to_run(Tracking(uri), (fs, f"{folder}/tracking-outbox"), tags=tags, artifacts=files)
    _show(measured.figures, measured.protocols)
    _say(f"kept in {path}")


def of_data(command: OfData) -> None:
    from pipelines.data.manifest import load_manifest
    from pipelines.evaluation.feature_networks import feature_network
    from pipelines.evaluation.measure import Settings, Subject, measure

    how, fs = command.how, open_storage(_store(command.how.store))
    manifest = load_manifest(fs, command.dataset)
    name = command.subject
    subject = Subject(name if name in ("noise", "grey") else "split", name)  # type: ignore[arg-type]
    if subject.kind == "split":
        manifest.shards(name)
    network = feature_network(fs, _folder(how.features))
    connect_ray()
    settings = Settings(how.samples, how.seed, how.pairs)
    measured = measure(fs, subject, manifest, command.split, network, settings, _say)
    _show(measured.figures, measured.protocols)


def compare(command: Compare) -> None:
    from pipelines.evaluation.results import alike, results_of, table

    fs = open_storage(_store(command.store))
    of_runs = []
    for run in dict.fromkeys(map(_folder, command.runs)):
        results = results_of(fs, run)
        if not results:
            raise FigmentError(f"nothing was measured of {run}: python -m jobs.evaluate run {run} --features RUN")
        of_runs.append(results)
    if not of_runs:
        raise FigmentError("no run is named: python -m jobs.evaluate compare runs/a runs/b")
    _say(table(alike(of_runs)))


def _store(given: str | None) -> str:
    store = given or default_store()
    if store is None:
        raise FigmentError("no storage is named: set FIGMENT_STORE or --store, e.g. to s3://bucket/prefix")
    return store


def _folder(run: str) -> str:
    """runs/NAME, also where only NAME was said."""
    run = run.rstrip("/")
    return run if run.startswith("runs/") else f"runs/{run}"


def _show(figures: dict[str, float], protocols: dict[str, str]) -> None:
    for name, value in figures.items():
        _say(f"{name:>16} {value:.5g}   {protocols[name]}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_job(main)
