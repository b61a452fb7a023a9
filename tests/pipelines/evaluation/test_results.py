"""What was measured is kept beside its run, and only like stands beside like."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pyarrow import fs as pafs

from pipelines.errors import FigmentError
from pipelines.evaluation.measure import Measured
from pipelines.evaluation.protocol import Protocol
from pipelines.evaluation.results import Result, alike, keep, result_of, results_of, table
from pipelines.objects import children, write_object
from tests.pipelines.training.toys import toy_spec


def measured(run: str, fid: float, n: int = 100, **more: float) -> Measured:
    figures = {"fid": fid, **more}
    protocol = Protocol("fid-1", "net:0", "none", n, "a@1/test", 50, "averaged", run, 0)
    return Measured(figures, {name: str(replace(protocol, metric=f"{name}-1")) for name in figures})


def result(
    run: str,
    fid: float,
    seed: int = 0,
    latent: int = 4,
    seen: int = 1_000,
    n: int = 100,
    threads: int = 0,
    **more: float,
) -> Result:
    spec = toy_spec("vae", seed=seed)
    spec = replace(spec, model=replace(spec.model, latent=latent))  # type: ignore[type-var]
    spec = replace(spec, cluster=replace(spec.cluster, threads_per_worker=threads))
    return result_of(run, spec, seen, measured(run, fid, n, **more))


def test_it_comes_back_and_the_same_measurement_again_replaces_it(store: pafs.FileSystem) -> None:
    one = result("a", 3.0)
    keep(store, "runs/a", one)
    assert results_of(store, "runs/a") == [one]
    again = replace(one, figures={"fid": 2.0}, measured_at="2030-01-01T00:00:00+00:00")
    other, later = result("a", 1.0, n=200), result("a", 0.5, seen=2_000)
    for one in (again, other, later):
        keep(store, "runs/a", one)
    assert results_of(store, "runs/a") == [other, later, again] and len(children(store, "runs/a/evaluations")) == 3
    assert results_of(store, "runs/none") == []
    write_object(store, "runs/a/evaluations/x.json", b'{"run": 1}')
    with pytest.raises(FigmentError, match=r"x\.json cannot be read"):
        results_of(store, "runs/a")


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]


def test_seeds_are_summed_up_and_other_settings_are_not() -> None:
    """Where it ran and how many threads it had are no settings; how long it was trained is none of chance."""
    found = [result("a", 3.0), result("b", 5.0, seed=1, threads=2), result("c", 9.0, latent=5)]
    found += [result("d", 4.0, seed=2, **{"is": 2.0}), result("e", 90.0, seed=3, seen=100)]
    text = table(found)
    assert [row[0] for row in rows(text)] == ["a", "b", "d", "mean ± deviation of 3 seeds", "c", "e"]
    assert rows(text)[3][2] == "4 ± 1" and rows(text)[2][3] == "2"
    assert text.splitlines()[-1].startswith("is: is-1 features=net:0")


def test_one_seed_under_two_names_is_no_spread() -> None:
    assert [row[0] for row in rows(table([result("a", 3.0), result("b", 3.0)]))] == ["a", "b"]


def test_of_each_run_the_newest_measurement_that_the_others_have_too_is_shown() -> None:
    few, many = [result("b", 4.0)], [result("b", 44.0, n=500)]
    assert alike([[result("a", 3.0)], few + many])[1] == few[0]
    assert [r.figures["fid"] for r in alike([[result("a", 3.0), result("a", 33.0, n=500)], few + many])] == [33.0, 44.0]
    alone = [result("a", 3.0)]
    assert alike([alone]) == alone
    with pytest.raises(FigmentError, match=r"a and b: fid: .*numbers of samples are 100 and 500; measure both alike"):
        alike([alone, many])
