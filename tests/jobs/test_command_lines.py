"""Every job says what it takes, and refuses what it does not know with the nearest name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import jobs.train
from jobs.entry import run_job
from jobs.recipes import listing
from pipelines.config import spec_from_dict
from pipelines.recipes import RECIPES

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py") if path.stem not in ("__init__", "entry"))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`python -m jobs.train …`, in this process: a new one takes seconds to import torch."""

    def called(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        monkeypatch.setenv("COLUMNS", "100")  # wider ones put options side by side
        try:
            run_job(jobs.train.main)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return called


@pytest.mark.servers
@pytest.mark.parametrize("job", JOBS)
def test_help_names_the_job_and_explains_every_option(job: str) -> None:
    done = _run(f"jobs.{job}", "--help")
    assert done.returncode == 0, done.stderr
    assert f"jobs.{job}" in done.stdout
    assert len(done.stdout.splitlines()) >= 8


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_help_with_its_own_defaults_and_a_dry_run_that_prints_the_spec(
    recipe: str, train: Callable[..., Done]
) -> None:
    spec = RECIPES[recipe]()
    text = train(recipe, "--help").stdout
    for option in (
        "--model.",
        "--data.dataset",
        "--training.images",
        "--visuals.clock",
        "--cluster.workers",
        "--store",
        "--ingest",
    ):
        assert option in text, option
    assert f"(default: {spec.data.dataset})" in " ".join(text.replace("│", " ").split())
    done = train(recipe, "--dry-run", "--training.seed", "5", "--cluster.workers", "1")
    assert done.returncode == 0, done.stderr
    resolved = spec_from_dict(json.loads(done.stdout))
    assert (resolved.training.seed, resolved.cluster.workers) == (5, 1)
    assert resolved.model == spec.model and resolved.expected == spec.expected


def test_without_a_recipe_all_are_listed_and_nothing_is_done(train: Callable[..., Done]) -> None:
    asked, forgotten = train("--help"), train()
    assert (asked.returncode, asked.stderr) == (0, "") and listing() in asked.stdout
    assert (forgotten.returncode, forgotten.stdout) == (2, "") and listing() in forgotten.stderr


def test_typing_errors_are_refused_with_the_nearest_name(train: Callable[..., Done]) -> None:
    option = train("dcgan-demo", "--training.imges", "3")
    assert option.returncode == 2 and "--training.images" in option.stderr + option.stdout
    recipe = train("dcgan-dmo")
    assert recipe.returncode == 2
    assert recipe.stderr.startswith("error: there is no recipe 'dcgan-dmo'; did you mean 'dcgan-demo'?")
    assert train("dcgan-demo", "--training.images", "many").returncode == 2


def test_a_job_without_a_storage_says_what_to_set(train: Callable[..., Done]) -> None:
    assert train("dcgan-demo") == Done(
        2, "", "error: no storage is named: set FIGMENT_STORE or --store, e.g. to s3://bucket/prefix\n"
    )


def test_a_batch_that_cannot_be_split_is_refused_before_anything_starts(train: Callable[..., Done]) -> None:
    done = train("dcgan-demo", "--dry-run", "--training.batch-size", "63")
    assert done.returncode == 2
    assert "--training.batch-size 63 cannot be split evenly among --cluster.workers 2" in done.stderr


def test_techniques_that_do_not_go_together_are_refused_before_anything_starts(train: Callable[..., Done]) -> None:
    done = train("dcgan-demo", "--dry-run", "--model.loss", "hinge", "--model.real-label", "0.9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: the model's settings do not go together: real_label smooths the label of a classifier"
    )
    chosen = ("--model.loss", "hinge", "--model.discriminator-norm", "spectral", "--model.augment", "colour", "cutout")
    model = json.loads(train("dcgan-demo", "--dry-run", *chosen).stdout)["model"]
    assert (model["loss"], model["discriminator_norm"], model["augment"]) == ("hinge", "spectral", ["colour", "cutout"])
