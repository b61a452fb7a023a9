"""Figures that were measured, kept beside their run, and several of them in one table.

    runs/NAME/evaluations/KEY.json   {"figures", "protocols", "recipe", "settings", "images_seen", "measured_at", …}

KEY is of the protocols: the same measurement of a run stands in one file, and the newer one replaces the older.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pyarrow import fs as pafs

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
    """Digest of the run's settings without its seed: runs that agree in it differ by chance alone."""
    seed: int
    images_seen: int
    figures: dict[str, float]
    protocols: dict[str, str]
    measured_at: str
    """ISO 8601, UTC."""


def keep(fs: pafs.FileSystem, folder: str, result: Result) -> str:
    """Writes it beside the run; returns the path."""
    key = hashlib.sha256(json.dumps(result.protocols, sort_keys=True).encode()).hexdigest()[:12]
    path = f"{folder}/evaluations/{key}.json"
    write_json(fs, path, asdict(result))
    return path


def result_of(
    run: str, recipe: str, settings: dict[str, object], seed: int, images_seen: int, measured: Measured
) -> Result:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    now = datetime.now(UTC).isoformat()
    return Result(run, recipe, digest, seed, images_seen, measured.figures, measured.protocols, now)


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


def table(results: Sequence[Result]) -> str:
    """Markdown: a line a run and figure by figure, and below runs that differ by their seed alone mean ± deviation.

    `FigmentError` where two figures of one name were not measured alike: their numbers must not stand side by side."""
    names = list(dict.fromkeys(name for result in results for name in result.figures))
    for name in names:
        first, *others = [(r, protocol_from_text(r.protocols[name])) for r in results if name in r.figures]
        for result, protocol in others:
            if why := difference(first[1], protocol):
                raise FigmentError(f"{name} of {first[0].run} and of {result.run}: {why}; measure both alike")
    lines = [["run", "images", *names], ["---"] * (2 + len(names))]
    for group in _groups(results):
        for result in group:
            values = [f"{result.figures[name]:.5g}" if name in result.figures else "" for name in names]
            lines.append([result.run, f"{result.images_seen:,}", *values])
        if len(group) > 1:
            lines.append([f"mean ± deviation of {len(group)} seeds", "", *(_spread(group, name) for name in names)])
    text = ["| " + " | ".join(line) + " |" for line in lines]
    protocols = {name: next(r.protocols[name] for r in results if name in r.figures) for name in names}
    return "\n".join([*text, "", *(f"{name}: {said}" for name, said in protocols.items())])


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.recipe, result.settings), []).append(result)
    return list(groups.values())


def _spread(group: Sequence[Result], name: str) -> str:
    """Mean and sample standard deviation, of those that have the figure."""
    values = [result.figures[name] for result in group if name in result.figures]
    if len(values) < 2:
        return ""
    return f"{statistics.mean(values):.5g} ± {statistics.stdev(values):.2g}"
