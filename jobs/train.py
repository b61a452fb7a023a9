"""Train a recipe: `python -m jobs.train RECIPE [--section.field value …]`, also through `ray job submit`.

The same command goes on from the newest checkpoint after a kill, and shows the result again when the run is complete.
`python -m jobs.train RECIPE --help` explains every setting.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pyarrow import fs as pafs

from infra.conditional import open_conditional
from infra.storage import default_store, open_storage
from jobs.entry import CODE, USER_ERROR, code_revision, connect_ray, run_job
from jobs.ingest import IngestJob, carry_out
from jobs.recipes import listing
from pipelines.config import RunSpec
from pipelines.data.known import KNOWN
from pipelines.data.manifest import NoDataSetError, load_manifest
from pipelines.errors import FigmentError
from pipelines.objects import read_object
from pipelines.recipes import RECIPES
from pipelines.recipes.recipe import Downloaded, Fetched, Generated, Recipe, Shipped


@dataclass(frozen=True)
class Where:
    """Where a run lives and what it is called."""

    name: str | None = None
    """Name of the run, and of its folder runs/NAME in the storage; by default the recipe's name."""
    store: str | None = None
    """Storage url (s3://bucket/prefix, file:///folder); by default FIGMENT_STORE."""
    tracking: str | None = None
    """MLflow tracking URI, or "none"; by default MLFLOW_TRACKING_URI. User and password come from the environment."""
    experiment: str = "figment"
    """MLflow experiment."""
    output: Path | None = None
    """Folder for copies of the final pictures on the machine that runs this command."""
    ingest: bool = False
    """Ingest the recipe's data first, when the storage has no data set of that name."""
    dry_run: bool = False
    """Print the resolved spec and stop."""


def main() -> None:
    spec, where = parse(sys.argv[1:])
    if where.dry_run:
        spec.check()
        print(json.dumps(spec.to_dict(), indent=2))
        return
    store = where.store or default_store()
    if store is None:
        raise FigmentError("no storage is named: set FIGMENT_STORE or --store, e.g. to s3://bucket/prefix")
    fs = open_storage(store)
    name = where.name or spec.recipe
    from pipelines.training.claim import finished

    if where.ingest and finished(fs, name, spec) is None:  # what is complete is shown again without its data
        bring_data(spec.data.dataset, RECIPES[spec.recipe], fs, store)
    connect_ray()
    from pipelines.tracking import Tracking
    from pipelines.training.reporter import expected_line
    from pipelines.training.trainer import launch

    uri = where.tracking or os.environ.get("MLFLOW_TRACKING_URI", "none")
    try:
        outcome = launch(
            spec,
            fs,
            name=name,
            tracking=None if uri == "none" else Tracking(uri, where.experiment),
            tags={"recipe": spec.recipe, **_source()},
            say=_say,
            leases=open_conditional(store),
        )
    except NoDataSetError as error:
        if spec.data.dataset != RECIPES[spec.recipe]().data.dataset:
            raise
        raise FigmentError(f"{error}; --ingest brings the data of recipe {spec.recipe!r} along") from error
    _say(f"done: {outcome.images_seen:,} images, {outcome.images_per_s:,.0f} images/s, {outcome.seconds:.0f} s")
    folder = f"{store.rstrip('/')}/{outcome.folder}"
    if where.output is not None:
        copied = _copy_pictures(fs, outcome.folder, outcome.pictures, where.output)
        _say(f"sample grid  {copied / outcome.grid}")
        _say(f"animation    {copied / outcome.animation}")
    else:
        _say(f"sample grid  {folder}/{outcome.grid}")
        _say(f"animation    {folder}/{outcome.animation}")
    _say(f"checkpoint   {store.rstrip('/')}/{outcome.checkpoint}")
    _say(f"MLflow       {outcome.tracking_url or 'not tracked'}")
    _say(expected_line(spec, outcome.figures))


def parse(arguments: list[str]) -> tuple[RunSpec, Where]:
    """A recipe's spec with the overrides of the command line; exits with code 2 and the nearest name on a typo."""
    prog = "python -m jobs.train"
    name = arguments[0] if arguments else ""
    if name in RECIPES:
        given = tyro.cli(_command(name, RECIPES[name]()), prog=f"{prog} {name}", args=arguments[1:])
        return replace(RECIPES[name](), **{section: getattr(given, section) for section in SECTIONS}), given.where
    if name and not name.startswith("-"):
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FigmentError(f"there is no recipe {name!r}; {hint}known: {', '.join(RECIPES)}")
    asked = name in ("-h", "--help")
    out = sys.stdout if asked else sys.stderr
    print(f"usage: {prog} RECIPE [--section.field value …]\n\n{__doc__}\n{listing()}", file=out, flush=True)
    raise SystemExit(0 if asked else USER_ERROR)


def bring_data(dataset: str, recipe: Recipe, fs: pafs.FileSystem, store: str) -> None:
    """Ingests what `recipe` needs into the storage, unless it has a complete data set of that name already.

    `FigmentError` when that data set cannot be read, or this one cannot be brought.
    """
    with suppress(NoDataSetError):
        load_manifest(fs, dataset)
        return
    name, _, version = dataset.partition("@")
    if name != recipe().data.dataset or version:
        raise FigmentError(
            f"there is no data set {dataset!r}, and --ingest only brings the recipe's own ({recipe().data.dataset}):"
            f" ingest it with `python -m jobs.ingest SOURCE --dataset-name {name}`"
        )
    match recipe.origin:
        case Shipped(path):
            carry_out(IngestJob(str(CODE / path), store, dataset_name=name), None, called=path)
        case Downloaded(known):  # also where a folder of that name lies here, which `jobs.ingest` would take
            carry_out(IngestJob(known, store, dataset_name=name), KNOWN[known])
        case Generated(script):
            with tempfile.TemporaryDirectory(prefix=f"figment-{name}-") as folder:
                made = subprocess.run([sys.executable, str(CODE / script), folder], check=False)
                if made.returncode:
                    raise FigmentError(f"{script}, which makes data set {name!r}, ended with code {made.returncode}")
                carry_out(IngestJob(folder, store, dataset_name=name), None, called=script)
        case Fetched(what, source):
            raise FigmentError(
                f"data set {name!r} is made of {what}, which only you can fetch:"
                f" then `python -m jobs.ingest {source} --dataset-name {name}`"
            )


SECTIONS = ("model", "data", "training", "visuals", "cluster")


def _command(name: str, recipe: RunSpec) -> type[Any]:
    """A recipe as a subcommand: each section has the type and the values that the recipe gives it."""
    sections: list[Any] = [(s, type(getattr(recipe, s)), field(default=getattr(recipe, s))) for s in SECTIONS]
    where = ("where", Annotated[Where, tyro.conf.arg(name="")], field(default=Where()))
    command = make_dataclass("Command", [*sections, where], frozen=True)
    command.__doc__ = RECIPES[name].make.__doc__
    return command


def _source() -> dict[str, str]:
    """The command and the commit of its code, for the run's page."""
    command = shlex.join(["python", "-m", "jobs.train", *sys.argv[1:]])
    commit = code_revision()
    known = {"mlflow.source.git.commit": commit} if commit else {}
    return {"mlflow.source.name": command, "mlflow.source.type": "JOB", **known}


def _copy_pictures(fs: pafs.FileSystem, folder: str, names: list[str], output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    for name in names:
        (output / name).write_bytes(read_object(fs, f"{folder}/{name}"))
    return output.absolute()


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_job(main)
