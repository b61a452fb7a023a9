"""Draw a grid of samples from a trained model: `python -m jobs.sample MODEL`, also through `ray job submit`.

MODEL is the folder of a run or checkpoint in the storage (`runs/dcgan-demo`, or with the storage's url in front), an
MLflow run id, or a registered model (`models:/figment-dcgan-demo/1`, `models:/figment-dcgan-demo@challenger`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from infra.storage import default_store, open_storage
from jobs.entry import run_job
from pipelines.errors import FigmentError
from pipelines.objects import write_object


@dataclass(frozen=True)
class Arguments:
    model: tyro.conf.Positional[str]
    """Folder of a run or checkpoint, MLflow run id, or models:/NAME/VERSION, models:/NAME@ALIAS."""
    n: int = 64
    """Images to draw."""
    columns: int = 8
    """Images in one row of the grid."""
    seed: int = 0
    """Of the latents: the same seed gives the same images."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE.png")] = "samples.png"
    """PNG to write: a local path, or store:PATH for a path in the storage."""
    store: str | None = None
    """Storage url (s3://bucket/prefix, file:///folder); by default FIGMENT_STORE."""
    tracking: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI."""
    dry_run: bool = False
    """Say what would be drawn and stop."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m jobs.sample", description=__doc__, args=sys.argv[1:])
    if arguments.n < 1 or arguments.columns < 1:
        raise FigmentError(f"--n is {arguments.n} and --columns {arguments.columns}; both must be at least 1")
    if arguments.dry_run:
        print(arguments)
        return
    from pipelines.evaluation.sampling import draw_samples, learner_from_checkpoint, learner_from_files
    from pipelines.training.visuals import grid, png

    to_store = arguments.output.startswith("store:")
    store, folder = _split(arguments.model, arguments.store or default_store())
    if store is None and (to_store or folder):
        raise FigmentError("no storage is named: set FIGMENT_STORE or --store, e.g. to s3://bucket/prefix")
    if folder:
        restored = learner_from_checkpoint(open_storage(str(store)), folder)
        learner, spec = restored.learner, restored.spec
    else:
        from pipelines.tracking import Tracking, fetch_published

        uri = arguments.tracking or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise FigmentError(
                f"{arguments.model!r} is looked up in MLflow, but no server is named: set MLFLOW_TRACKING_URI or"
                " --tracking; a folder in the storage begins with runs/"
            )
        learner, spec = learner_from_files(fetch_published(Tracking(uri), arguments.model))
    picture = png(grid(draw_samples(learner, arguments.n, arguments.seed), arguments.columns))
    if to_store:
        write_object(open_storage(str(store)), arguments.output.removeprefix("store:"), picture)
        place = f"{str(store).rstrip('/')}/{arguments.output.removeprefix('store:')}"
    else:
        path = Path(arguments.output).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
        place = str(path)
    print(f"{arguments.n} samples of {spec.recipe} (seed {arguments.seed}): {place}", flush=True)


def _split(model: str, store: str | None) -> tuple[str | None, str]:
    """(storage url, runs/… in it), or (store, "") for what is looked up in MLflow."""
    if model.startswith("runs/"):
        return store, model
    root, found, rest = model.rpartition("/runs/")
    return (root, f"runs/{rest}") if found else (store, "")


if __name__ == "__main__":
    run_job(main)
