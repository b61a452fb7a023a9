"""What the tests of tracking ask again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from pyarrow import fs as pafs
from torch import nn

from infra.processes import Running, free_ports, start, stop, wait_until_serving
from infra.servers import MLFLOW_PORTS, mlflow_server
from pipelines.objects import children
from pipelines.tracking import Tracking

OUTBOX = "runs/a/tracking-outbox"
PATIENCE_S = 180.0


class Stoppable:
    """A server on one port and one database, which can go away and come back."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(MLFLOW_PORTS).values()
        self._server = mlflow_server(folder, port, f"file://{folder}/artifacts", storage={})
        self.url = self._server.url
        self._log = folder / "log"
        self._running: Running | None = None

    def up(self) -> None:
        if self._running is None:
            self._running = start(self._server, self._log)
            wait_until_serving(self._server, self._running, self._log)

    def down(self) -> None:
        if self._running is not None:
            stop(self._running)
            self._running = None


def history(tracking: Tracking, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in tracking.client().get_metric_history(run_id, key)]


def segments(outbox: tuple[pafs.FileSystem, str]) -> list[str]:
    return [name for name in children(*outbox) if name.endswith(".records")]


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


class Generator(nn.Module):
    """z (B, 5) -> images (B, 3, 4, 4) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(5, 16), nn.BatchNorm1d(16)
        self.up = nn.ConvTranspose2d(4, 3, 4, 2, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.dense(z))).unflatten(1, (4, 2, 2))
        return torch.sigmoid(self.up(h))
