"""What the tests of tracking ask again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from pyarrow import fs as pafs
from torch import nn

from pipelines.objects import children
from pipelines.tracking import Tracking
from tests.faults import FaultProxy

OUTBOX = "runs/a/tracking-outbox"
PATIENCE_S = 180.0


class Stoppable:
    """A server that can go away and come back: a real one behind a port that is closed and opened again."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy
        self.url = proxy.url
        self.up, self.down = proxy.accept, proxy.refuse


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
