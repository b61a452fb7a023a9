"""Servers as child processes that outlive the command which started them: start, know again, watch, stop.

Every server leads a session of its own, so whatever it forks is found by the session, also after the leader died. A
process is known by its id *and* its time of birth: an id that the system gave away again is never signalled.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PORTS = range(20000, 30000)  # below what systems hand out for outgoing connections, above what people number by hand


class StackError(Exception):
    """One sentence, and perhaps the end of a log, about a server that does not run as it should."""


@dataclass(frozen=True)
class Server:
    """What is needed to start one server and to see that it serves."""

    name: str
    url: str
    command: Sequence[str]
    environment: Mapping[str, str]  # added to this process's own; holds secrets
    folder: Path  # its working directory
    check: Callable[[], None]  # raises while it does not serve
    without: Sequence[str] = ()  # variables of this process that it must not see
    leftovers: Sequence[Path] = ()  # files that it leaves behind outside of its folder
    patience_s: float = 180.0  # until it must serve, on a loaded machine

    def __repr__(self) -> str:  # the environment holds secrets
        return f"Server({self.name} at {self.url})"


@dataclass(frozen=True)
class Running:
    pid: int
    born: float  # seconds after the machine started: unlike a time of day, it stays when the clock is set


def start(server: Server, log: Path) -> Running:
    """Starts `server` in a session of its own, its output in `log` (the one before stays beside it)."""
    server.folder.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name not in server.without}
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(server.command),
            env={**inherited, **server.environment},
            cwd=server.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(process.pid, _born(psutil.Process(process.pid)))


def _born(process: psutil.Process) -> float:
    booted = psutil.boot_time()  # first: psutil counts births from what it returned last
    return round(process.create_time() - booted, 2)


def _is(process: psutil.Process, running: Running) -> bool:
    return abs(_born(process) - running.born) < 1.0


def alive(running: Running) -> bool:
    try:
        process = psutil.Process(running.pid)
        return _is(process, running) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_serving(server: Server, running: Running, log: Path) -> float:
    """Seconds until `server` served. `StackError` when it ends first or takes longer than its patience."""
    began = time.monotonic()
    while True:
        try:
            server.check()
            return time.monotonic() - began
        except Exception as error:  # noqa: BLE001 - a server that starts fails its check in every way there is
            reason = error
        if not alive(running):
            raise StackError(f"{server.name} ended while it started; the end of {log}:\n{tail(log)}")
        if time.monotonic() - began > server.patience_s:
            raise StackError(
                f"{server.name} does not serve after {server.patience_s:.0f} s ({reason});"
                f" the end of {log}:\n{tail(log)}"
            )
        time.sleep(0.1)


def stop(running: Running, leftovers: Sequence[Path] = (), grace_s: float = 15.0) -> None:
    """Ends the whole session that `running` leads: asks first, kills what is left after `grace_s`."""
    _end(running, grace_s)
    for path in leftovers:
        path.unlink(missing_ok=True)


def _end(running: Running, grace_s: float) -> None:
    for ask, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        members = session(running)
        for process in members:
            try:
                process.send_signal(ask)
            except psutil.NoSuchProcess:
                continue
        if not psutil.wait_procs(members, timeout=patience)[1] and not session(running):
            return


def session(running: Running) -> list[psutil.Process]:
    """The living processes of the session that `running` leads or led."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) != running.pid or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.pid == running.pid and not _is(process, running):
                return []  # the id belongs to someone else now, so the session is gone
            members.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return members


def free_ports(names: Sequence[str], partner: int = 0, apart_from: Iterable[int] = ()) -> dict[str, int]:
    """A free loopback port for each name; with `partner`, the port that far above is free too."""
    ports: dict[str, int] = {}
    taken: set[int] = set(apart_from)
    chooser = random.SystemRandom()
    for name in names:
        for _ in range(1000):
            port = chooser.choice(PORTS)
            wanted = {port, port + partner}
            if not wanted & taken and all(port_is_free(p) for p in wanted):
                ports[name] = port
                taken |= wanted
                break
        else:
            raise StackError(f"no free port between {PORTS.start} and {PORTS.stop} on 127.0.0.1")
    return ports


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of `log`, each cut to 240 characters, without Ray's long dumps of counters."""
    if not log.exists():
        return "    (no log)"
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65536))
        text = stream.read().decode(errors="replace")
    kept = [line[:240] for line in text.splitlines() if line.strip() and "[state-dump]" not in line][-lines:]
    return "\n".join(f"    {line}" for line in kept) or "    (the log is empty)"
