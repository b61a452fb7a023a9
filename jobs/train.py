"""Train a recipe: `python -m jobs.train RECIPE [--section.field value …]`, also through `ray job submit`.

The same command goes on from the newest checkpoint after a kill, and shows the result again when the run is complete.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
import sys
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pyarrow import fs as pafs

from infra.conditional import open_conditional
from infra.storage import default_store, open_storage
from jobs.entry import code_revision, connect_ray, run_job
from pipelines.config import RunSpec
from pipelines.errors import FigmentError
from pipelines.objects import read_object
from pipelines.recipes import RECIPES


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
    connect_ray()
    from pipelines.tracking import Tracking
    from pipelines.training.reporter import expected_line
    from pipelines.training.trainer import launch

    uri = where.tracking or os.environ.get("MLFLOW_TRACKING_URI", "none")
    outcome = launch(
        spec,
        fs,
        name=where.name or spec.recipe,
        tracking=None if uri == "none" else Tracking(uri, where.experiment),
        tags={"recipe": spec.recipe, **_source()},
        say=_say,
        leases=open_conditional(store),
    )
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
    listing: dict[str, Any] = {name: _command(name, recipe()) for name, recipe in RECIPES.items()}
    tyro.extras.subcommand_cli_from_dict(listing, prog=prog, description=__doc__, args=arguments)
    raise AssertionError("tyro lets no command line without a recipe pass")


SECTIONS = ("model", "data", "training", "visuals", "cluster")


def _command(name: str, recipe: RunSpec) -> type[Any]:
    """A recipe as a subcommand: each section has the type and the values that the recipe gives it."""
    sections: list[Any] = [(s, type(getattr(recipe, s)), field(default=getattr(recipe, s))) for s in SECTIONS]
    where = ("where", Annotated[Where, tyro.conf.arg(name="")], field(default=Where()))
    command = make_dataclass("Command", [*sections, where], frozen=True)
    command.__doc__ = RECIPES[name].__doc__
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
