"""What was measured is kept beside its run, and only like stands beside like."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pyarrow import fs as pafs

from pipelines.errors import FigmentError
from pipelines.evaluation.measure import Measured
from pipelines.evaluation.protocol import Protocol
from pipelines.evaluation.results import Result, keep, result_of, results_of, table
from pipelines.objects import children, write_object


def measured(run: str, fid: float, n: int = 100, **more: float) -> Measured:
    figures = {"fid": fid, **more}
    protocol = Protocol("fid-1", "net:0", "none", n, "a@1/test", 50, "averaged", run, 0)
    return Measured(figures, {name: str(replace(protocol, metric=f"{name}-1")) for name in figures})


def result(run: str, fid: float, seed: int = 0, lr: float = 1.0, **more: float) -> Result:
    return result_of(run, "dcgan-toy", {"model": {"lr": lr}}, seed, 1_000, measured(run, fid, **more))


def test_it_comes_back_and_the_same_measurement_again_replaces_it(store: pafs.FileSystem) -> None:
    one = result("a", 3.0)
    keep(store, "runs/a", one)
    assert results_of(store, "runs/a") == [one]
    again = replace(one, figures={"fid": 2.0}, measured_at="2030-01-01T00:00:00+00:00")
    other = replace(result("a", 1.0), protocols=measured("a", 1.0, n=200).protocols)
    for one in (again, other):
        keep(store, "runs/a", one)
    assert results_of(store, "runs/a") == [other, again] and len(children(store, "runs/a/evaluations")) == 2
    assert results_of(store, "runs/none") == []
    write_object(store, "runs/a/evaluations/x.json", b'{"run": 1}')
    with pytest.raises(FigmentError, match=r"x\.json cannot be read"):
        results_of(store, "runs/a")


def test_seeds_are_summed_up_and_other_settings_are_not() -> None:
    text = table(
        [result("a", 3.0), result("b", 5.0, seed=1), result("c", 9.0, lr=2.0), result("d", 4.0, seed=2, **{"is": 2.0})]
    )
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines] == [
        "| run",
        "| ---",
        "| a",
        "| b",
        "| d",
        "| mean ± deviation of 3 seeds",
        "| c",
    ]
    assert lines[5][2:] == ["4 ± 1", " |"]
    assert lines[4][3] == "2 |" and text.splitlines()[-1].startswith("is: is-1 features=net:0")


def test_figures_of_other_protocols_do_not_stand_side_by_side() -> None:
    other = result_of("b", "dcgan-toy", {}, 0, 1_000, measured("b", 3.0, n=99))
    with pytest.raises(
        FigmentError, match=r"fid of a and of b: .*numbers of samples are 100 and 99; measure both alike"
    ):
        table([result("a", 3.0), other])
