"""A real MLflow server that the tests stop, start and lose."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import OUTBOX, Stoppable
from pyarrow import fs as pafs

from infra.storage import open_storage
from pipelines.tracking import Tracking
from tests.faults import FaultProxy


@pytest.fixture(scope="session")
def stoppable(mlflow_server: str) -> Iterator[Stoppable]:
    with FaultProxy(mlflow_server) as proxy:
        yield Stoppable(proxy)


@pytest.fixture
def server(stoppable: Stoppable) -> Stoppable:
    stoppable.up()
    return stoppable


@pytest.fixture
def tracking(server: Stoppable) -> Tracking:
    return Tracking(server.url, experiment=f"test-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def outbox(tmp_path: Path) -> tuple[pafs.FileSystem, str]:
    return open_storage(str(tmp_path / "store")), OUTBOX
