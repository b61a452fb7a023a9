"""The line between the workers of a run and the process that launched it: what they say, and the error that ends it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_S = 0.5
WATCHED = ("pipelines", "figment.storage")  # whose warnings are for the user


@ray.remote(num_cpus=0)
class _Line:
    """Workers' stdout would come with Ray's prefixes; and an error told through the storage could not tell that the
    storage is gone."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._error: Exception | None = None

    def put(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def fail(self, error: Exception) -> None:
        self._error = self._error or error

    def error(self) -> Exception | None:
        return self._error


def open_line() -> Any:
    """On this node: when it is lost, so is the launch."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _Line.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


def speaker(line: Any) -> Callable[[str], None]:
    def say(text: str) -> None:
        line.put.remote(text)  # fire and forget: speaking never waits

    return say


def tell_error(line: Any, error: Exception) -> None:
    """The launch ends with this error, and is not tried again: the first one that a worker tells counts."""
    ray.get(line.fail.remote(error))


def told_error(line: Any) -> Exception | None:
    try:
        return ray.get(line.error.remote())
    except ray.exceptions.RayActorError:  # the line is lost, and with it the launching process's node
        return None


@contextmanager
def following(line: Any, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, lines that workers speak appear through `say`; all that were spoken have appeared when it ends."""
    stop = threading.Event()

    def follow() -> None:
        last = False
        while not last:
            last = stop.wait(POLL_S)
            try:
                lines = ray.get(line.take.remote())
            except ray.exceptions.RayError as error:
                logging.getLogger(__name__).warning("the run's live line was lost: %s", error)
                return
            for text in lines:
                say(text)

    thread = threading.Thread(target=follow, name="figment-line", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def spoken_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, what this process's stream, checkpoints, tracking and storage warn of is said: that they wait, and for
    what. The log of a worker is where nobody looks."""
    handler = _Saying(say)
    for name in WATCHED:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in WATCHED:
            logging.getLogger(name).removeHandler(handler)


class _Saying(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(f"  ! {record.getMessage()}")
