"""The two workers of the session, and a stream that needs no cluster."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from pipelines.data import stream
from pipelines.data.windows import Layout, Read, read_window
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


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """The stream reads its windows in the process that trains, without Ray Data's tasks: the same blocks in the same
    order, which is what test_stream.py asserts of the tasks."""

    def blocks(fs: pafs.FileSystem, layout: Layout, reads: Iterator[Read]) -> Generator[pa.Table, None, None]:
        for read in reads:
            yield from read_window(fs, layout, read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_blocks", blocks)
        yield
