"""Figures that were measured, kept beside their run, and several of them in one table.

    runs/NAME/evaluations/KEY.json   {"figures", "protocols", "recipe", "settings", "images_seen", "measured_at", …}

KEY is of the protocols and the images seen: the same measurement of the same weights stands in one file, and the newer
one replaces the older.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from pyarrow import fs as pafs

from pipelines.config import RunSpec
from pipelines.errors import FigmentError
from pipelines.evaluation.measure import Measured
from pipelines.evaluation.protocol import difference, protocol_from_text
from pipelines.objects import children, read_json, write_json


@dataclass(frozen=True)
class Result:
    """One measurement of one run."""

    run: str
    recipe: str
    settings: str
    """Identity of the run's settings without its seed: runs that agree in it differ by chance alone."""
    seed: int
    images_seen: int
    figures: dict[str, float]
    protocols: dict[str, str]
    measured_at: str
    """ISO 8601, UTC."""


def keep(fs: pafs.FileSystem, folder: str, result: Result) -> str:
    """Writes it beside the run; returns the path."""
    about = [result.images_seen, result.protocols]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    path = f"{folder}/evaluations/{key}.json"
    write_json(fs, path, asdict(result))
    return path


def result_of(run: str, spec: RunSpec, images_seen: int, measured: Measured) -> Result:
    training = spec.training
    settings = replace(spec, training=replace(training, seed=0)).identity
    now = datetime.now(UTC).isoformat()
    return Result(run, spec.recipe, settings, training.seed, images_seen, measured.figures, measured.protocols, now)


def results_of(fs: pafs.FileSystem, folder: str) -> list[Result]:
    """All that was measured of a run, oldest first."""
    names = [name for name in children(fs, f"{folder}/evaluations") if name.endswith(".json")]
    found = []
    for name in names:
        try:
            found.append(Result(**read_json(fs, f"{folder}/evaluations/{name}")))
        except (ValueError, TypeError) as error:
            raise FigmentError(
                f"{folder}/evaluations/{name} cannot be read ({error}): remove it and measure again"
            ) from error
    return sorted(found, key=lambda result: result.measured_at)


def alike(of_runs: Sequence[Sequence[Result]]) -> list[Result]:
    """Of each run the newest measurement that was made as those of the others; of several such ways the newest.

    `FigmentError` where the newest two have nothing in common: their numbers must not stand side by side."""
    first, *others = of_runs
    for result in reversed(first):
        chosen = [next((r for r in reversed(other) if not _why(result, r)), None) for other in others]
        if None not in chosen:
            return [result, *(r for r in chosen if r is not None)]
    one, other = next((first[-1], o[-1]) for o in others if all(_why(r, o[-1]) for r in first))
    raise FigmentError(f"{one.run} and {other.run}: {_why(one, other)}; measure both alike")


def _why(one: Result, other: Result) -> str:
    """Why two results cannot stand side by side; "" where nothing speaks against it."""
    for name in one.figures.keys() & other.figures.keys():
        if why := difference(protocol_from_text(one.protocols[name]), protocol_from_text(other.protocols[name])):
            return f"{name}: {why}"
    return ""


def table(results: Sequence[Result]) -> str:
    """Markdown of results that are alike: a line a run, and below runs of other seeds alone mean ± deviation."""
    names = list(dict.fromkeys(name for result in results for name in result.figures))
    lines = [["run", "images", *names], ["---"] * (2 + len(names))]
    for group in _groups(results):
        for result in group:
            values = [f"{result.figures[name]:.5g}" if name in result.figures else "" for name in names]
            lines.append([result.run, f"{result.images_seen:,}", *values])
        by_seed = list({result.seed: result for result in group}.values())
        if len(by_seed) == len(group) > 1:
            lines.append([f"mean ± deviation of {len(group)} seeds", "", *(_spread(group, name) for name in names)])
    text = ["| " + " | ".join(line) + " |" for line in lines]
    protocols = {name: next(r.protocols[name] for r in results if name in r.figures) for name in names}
    return "\n".join([*text, "", *(f"{name}: {said}" for name, said in protocols.items())])


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.settings, result.images_seen), []).append(result)
    return list(groups.values())


def _spread(group: Sequence[Result], name: str) -> str:
    """Mean and sample standard deviation, of those that have the figure."""
    values = [result.figures[name] for result in group if name in result.figures]
    if len(values) < 2:
        return ""
    return f"{statistics.mean(values):.5g} ± {statistics.stdev(values):.2g}"
