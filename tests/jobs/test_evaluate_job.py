"""`python -m jobs.evaluate`, in this process, on a real Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs as pafs

import jobs.evaluate
from jobs.entry import run_job
from pipelines.objects import children, write_json
from tests.pipelines.evaluation.test_measure import SHAPE, untrained
from tests.pipelines.training.toys import toy_dataset

pytestmark = pytest.mark.usefixtures("ray_cluster")

Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """(exit code, stdout, stderr) of the job on a storage in a folder."""
    (tmp_path / "store").mkdir(exist_ok=True)
    monkeypatch.setenv("FIGMENT_STORE", f"file://{tmp_path / 'store'}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        try:
            run_job(jobs.evaluate.main)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return called


def test_a_run_is_measured_kept_and_compared(store: pafs.FileSystem, evaluate: Evaluate) -> None:
    manifest = toy_dataset(store, SHAPE, train=70, test=64)
    untrained(store, "features", "residual-classifier")
    for seed, name in enumerate(("one", "two")):
        folder = untrained(store, name, "vae-gaussian", seed=seed)
        write_json(store, f"{folder}/run.json", {"dataset": f"toy@{manifest.version}"})
    how = ("--features", "runs/features", "--samples", "100", "--pairs", "50")
    for name in ("runs/one", "two"):
        code, out, err = evaluate("run", name, *how)
        assert code == 0, err
        assert "100/100 samples of " in out and "kept in runs/" in out
        assert "fid-1 features=residual-classifier:" in out
    assert len(children(store, "runs/one/evaluations")) == 1
    code, out, err = evaluate("compare", "one", "runs/two")
    assert code == 0 and "| one | 0 |" in out and "| two | 0 |" in out and "mean ± deviation of 2 seeds" in out, err
    untrained(store, "three", "vae-gaussian", seed=2)
    write_json(store, "runs/three/run.json", {"dataset": f"toy@{manifest.version}"})
    code, out, err = evaluate("run", "three", "--features", "runs/features", "--samples", "99", "--pairs", "50")
    assert code == 0, err
    code, out, err = evaluate("compare", "one", "three")
    assert code == 2 and "numbers of samples are 100 and 99" in err and err.count("\n") == 1
    code, out, err = evaluate("data", "toy", "grey", *how)
    assert code == 0 and "class_kl" in out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "none", "--features", "runs/features"), "there is no run runs/none"),
        (("compare", "none"), "nothing was measured of runs/none"),
        (("compare",), "no run is named"),
        (("data", "toy", "valid", "--features", "runs/features"), "'valid'"),
        (("data", "toys", "train", "--features", "runs/features"), "toys"),
        (("data", "toy", "train", "--features", "runs/none"), "runs/none"),
    ],
)
def test_what_is_not_there_is_named(
    store: pafs.FileSystem, evaluate: Evaluate, arguments: tuple[str, ...], words: str
) -> None:
    toy_dataset(store, SHAPE)
    code, _, err = evaluate(*arguments)
    assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1
