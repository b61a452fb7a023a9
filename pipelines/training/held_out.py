"""Figures of a whole held-out set: what a learner says of every image, gathered from all workers, measured at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from models.contract import Batch, Measures
from pipelines.training.collectives import gather

Part = tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]
"""Codes, labels, columns of some images, on the CPU."""


class HeldOut:
    """What one worker has encoded of its contiguous share, in stored order."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._parts: list[Part] = []

    def add(self, learner: Measures, batch: Batch) -> None:
        codes = {name: code.cpu() for name, code in learner.encode(batch, self._generator).items()}
        columns = {name: column.cpu() for name, column in batch.columns.items()}
        self._parts.append((codes, batch.labels.cpu(), columns))

    def figures(self, learner: Measures) -> dict[str, float]:
        """Of the images of all workers, in the order of their ranks, which is the stored one. Every worker must ask,
        and has the same answer."""
        codes, labels, columns = _joined([part for parts in gather(self._parts) for part in parts])
        return learner.measure(codes, labels, columns)


def merged(means: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Both kinds of figure of one evaluation. ValueError: a name that stands for two of them."""
    if twice := sorted(means.keys() & measured.keys()):
        raise ValueError(f"evaluate() and measure() both give {', '.join(twice)}; one of them needs another name")
    return {**means, **measured}


def _joined(parts: list[Part]) -> Part:
    """`parts` is not empty: a split without rows is refused before a run starts."""
    of_codes, of_labels, of_columns = zip(*parts, strict=True)
    return _each(of_codes), torch.cat(of_labels), _each(of_columns)


def _each(parts: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
