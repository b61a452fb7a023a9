"""Two real worker processes in one gloo group, kept for the whole session: starting torch twice takes seconds."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


class Pair:
    """Calls a function of a test module on both workers at once."""

    def __init__(self, folder: Path) -> None:
        context = get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there, f"{folder}/meeting"), daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """[work(rank, *arguments) of each rank]. An error of one is raised; the other may then wait for it for ever, so
        the pair is of no use any more."""
        try:
            return self._run(pickle.dumps((work, arguments)))
        except (EOFError, OSError):  # a worker is gone
            self.close()
            raise

    def _run(self, task: bytes) -> list[Any]:
        for end in self._ends:
            end.send_bytes(task)
        results: dict[int, Any] = {}
        while len(results) < WORLD:
            for end in wait([end for rank, end in enumerate(self._ends) if rank not in results]):
                done, value = pickle.loads(end.recv_bytes())  # type: ignore[union-attr]
                if not done:
                    self.close()
                    raise AssertionError(f"a worker failed:\n{value}")
                results[self._ends.index(end)] = value  # type: ignore[arg-type]
        return [results[rank] for rank in range(WORLD)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, end: Connection, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    while True:
        try:
            work, arguments = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, work(rank, *arguments)))
            end.send_bytes(answer)
        except BaseException:  # noqa: BLE001 - the test raises it
            end.send_bytes(pickle.dumps((False, traceback.format_exc())))
