"""The two workers of the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pipelines.training.pair import Pair


@pytest.fixture(scope="session")
def _pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Pair]]:
    pairs = [Pair(tmp_path_factory.mktemp("pair"))]
    yield pairs
    pairs[-1].close()


@pytest.fixture
def pair(_pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two workers of one gloo group; new ones after a test in which one failed."""
    if not _pairs[-1].alive:
        _pairs.append(Pair(tmp_path_factory.mktemp("pair")))
    return _pairs[-1]
