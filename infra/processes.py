"""Servers as child processes that outlive the command which started them: start, know again, watch, stop.

Every server leads a session of its own, so whatever it forks is found by the session, also after the leader died. Ids
of processes and sessions are given away again, so an id alone proves nothing: see `session` for what does.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "FIGMENT_STARTED_AS"
"""The variable that holds the mark of the server that a process belongs to."""

# Below what systems hand out for outgoing connections, above what people number by hand. FIGMENT_PORTS names others,
# for a machine where these are taken, and for stacks that start at the same moment.
PORTS = "20000-29999"


class StackError(Exception):
    """One sentence, and perhaps the end of a log, about a server that does not run as it should."""


class EndedEarly(StackError):
    """A server ended before it served."""


@dataclass(frozen=True)
class Server:
    """What is needed to start one server and to see that it serves."""

    name: str
    url: str
    command: Sequence[str]
    environment: Mapping[str, str]  # added to this process's own; holds secrets
    folder: Path  # its working directory
    answers: Callable[[], object]  # one quick question; raises when it gets no answer
    works: Callable[[], object]  # a whole round of its work; raises while it cannot do it
    prepare: Callable[[], object] = lambda: None  # writes what it reads at its start
    told: str = ""  # a digest of what it learns at its start alone: when that changes, it has to be started again
    starts: int = 1  # how often it is started before one believes that it cannot
    umask: int = 0o077  # what it writes is for this user alone; -1: as this process
    without: Sequence[str] = ()  # variables of this process that it must not see
    leftovers: Sequence[Path] = ()  # files that it leaves behind outside of its folder
    patience_s: float = 180.0  # until it must serve, on a loaded machine

    def __repr__(self) -> str:  # the environment holds secrets
        return f"Server({self.name} at {self.url})"


@dataclass(frozen=True)
class Running:
    pid: int
    born: float  # seconds after the machine started: unlike a time of day, it stays when the clock is set
    mark: str = ""  # in the environment of the process and of all that it starts; "" when an earlier version started it
    told: str = ""  # see `Server`


def start(server: Server, log: Path) -> Running:
    """Starts `server` in a session of its own, its output in `log` (the one before stays beside it)."""
    for folder in (server.folder, log.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    server.prepare()
    inherited = {name: value for name, value in os.environ.items() if name not in server.without}
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    mark = secrets.token_hex(16)
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        process = subprocess.Popen(
            list(server.command),
            env={**inherited, **server.environment, MARK: mark},
            cwd=server.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=server.umask,
        )
    running = Running(process.pid, _born(psutil.Process(process.pid)), mark, server.told)
    # For a moment after the program was exchanged the kernel shows no environment, and its process would pass for dead.
    until = time.monotonic() + 10.0
    while process.poll() is None and not alive(running) and time.monotonic() < until:
        time.sleep(0.005)
    return running


def _born(process: psutil.Process) -> float:
    booted = psutil.boot_time()  # first: psutil counts births from what it returned last
    return round(process.create_time() - booted, 2)


def _leads(process: psutil.Process, running: Running) -> bool:
    """Whether `process`, which has the id of `running`, is the very process that was started."""
    # After a restart of the machine the same id may well be born at the same second after it: the mark tells.
    return abs(_born(process) - running.born) < 1.0 and (not running.mark or _marked(process, running))


def _marked(process: psutil.Process, running: Running) -> bool:
    try:
        return bool(running.mark) and process.environ().get(MARK) == running.mark
    except psutil.AccessDenied:
        return False  # another user's, so not ours


def alive(running: Running) -> bool:
    try:
        process = psutil.Process(running.pid)
        return process.status() != psutil.STATUS_ZOMBIE and _leads(process, running)
    except psutil.NoSuchProcess:  # ZombieProcess is one
        return False


def wait_for_ending(running: Running, patience_s: float = 10.0) -> None:
    """A process that was killed loses its environment at once, its ports some moments later: waits for the latter."""
    with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        process = psutil.Process(running.pid)
        if abs(_born(process) - running.born) < 1.0 and process.status() != psutil.STATUS_ZOMBIE and not alive(running):
            process.wait(patience_s)


def wait_until_serving(server: Server, running: Running, log: Path) -> float:
    """Seconds until `server` did its work. `StackError` when it ends first or takes longer than its patience."""
    began = time.monotonic()
    while True:
        try:
            server.answers()
            server.works()
            return time.monotonic() - began
        except Exception as error:  # noqa: BLE001 - a server that starts fails its check in every way there is
            reason = error
        if not alive(running):
            raise EndedEarly(f"{server.name} ended while it started; the end of {log}:\n{tail(log)}")
        if time.monotonic() - began > server.patience_s:
            raise StackError(
                f"{server.name} does not serve after {server.patience_s:.0f} s ({reason});"
                f" the end of {log}:\n{tail(log)}"
            )
        time.sleep(0.1)


def wait_or_start_again(
    server: Server, running: Running, log: Path, remember: Callable[[Running], object] = lambda again: None
) -> Running:
    """As `wait_until_serving`, but one that ends early is started again, as often as it allows; `remember` is told."""
    for more in reversed(range(server.starts)):
        try:
            wait_until_serving(server, running, log)
            break
        except EndedEarly:
            if not more:
                raise
            stop(running, server.leftovers)
            running = start(server, log)
            remember(running)
    return running


def why_silent(server: Server, running: Running, patience_s: float) -> str | None:
    """Why the part does not serve; None as soon as it answers. A busy one is asked for as long as `patience_s`.

    On a machine under load a healthy server leaves a question unanswered for many seconds: one failed question says
    nothing, and to believe it would end a training.
    """
    began, said = time.monotonic(), False
    while True:
        if not alive(running):
            return f"it ended by itself (pid {running.pid})"
        try:
            server.answers()
            return None
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            reason = error
        if time.monotonic() - began >= patience_s:
            return f"pid {running.pid} runs but does not answer: {reason}"
        if not said:
            said = True
            print(f"the {server.name} does not answer ({reason}); asking again for {patience_s:.0f} s …", flush=True)
        time.sleep(1.0)


def stop(running: Running, leftovers: Sequence[Path] = (), grace_s: float = 15.0) -> None:
    """Ends the whole session that `running` leads: asks first, kills what is left after `grace_s`."""
    _end(running, grace_s)
    for path in leftovers:
        path.unlink(missing_ok=True)


def _end(running: Running, grace_s: float) -> None:
    members: set[psutil.Process] = set()
    for ask, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        # Those found first stay known, by id and birth: with the leader gone, not all of them could prove themselves.
        members |= set(session(running))
        for process in members:
            try:
                process.send_signal(ask)  # psutil sends nothing when the id is another process's by now
            except psutil.NoSuchProcess:
                continue
        left = psutil.wait_procs(list(members), timeout=patience)[1]
        if not left and not session(running):
            return


def session(running: Running) -> list[psutil.Process]:
    """The living processes that provably belong to the session that `running` leads or led.

    While the leader lives, known by its birth and its mark, the session is its own: nobody can enter the session of
    another. Once it is gone, the number of the session proves nothing. The kernel gives a number to nobody else as long
    as one process has it as its session, but after the last one ended it is free, on this boot of the machine or the
    next, and a stranger may lead a session with it, die, and leave its children behind: same user, same session id,
    born after our leader. So from then on a process belongs when the mark is in its environment, which it has from our
    server alone; or when its parent belongs, because some (Ray's dashboard modules) write their title over it. What can
    prove neither is left alone.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == running.pid and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
        except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            continue
    if running.pid in found:
        # An id that belongs to someone else now, as the leader of a session even, means that ours is gone.
        return list(found.values()) if alive(running) else []
    ours: dict[int, psutil.Process] = {}
    for process in sorted(found.values(), key=_born_or_never):  # parents before their children
        try:
            if _marked(process, running) or process.ppid() in ours:
                ours[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return list(ours.values())


def _born_or_never(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.NoSuchProcess:
        return float("inf")


def free_ports(
    names: Sequence[str], partner: int = 0, apart_from: Iterable[int] = (), among: Sequence[int] | None = None
) -> dict[str, int]:
    """A free loopback port for each name; with `partner`, the port that far above is free too."""
    among = among or _allowed_ports()
    ports: dict[str, int] = {}
    taken: set[int] = set(apart_from)
    chooser = random.SystemRandom()
    for name in names:
        for _ in range(1000):
            port = chooser.choice(among)
            wanted = {port, port + partner}
            if not wanted & taken and all(port_is_free(p) for p in wanted):
                ports[name] = port
                taken |= wanted
                break
        else:
            raise StackError(f"no free port between {among[0]} and {among[-1]} on 127.0.0.1")
    return ports


def _allowed_ports() -> range:
    text = os.environ.get("FIGMENT_PORTS", PORTS)
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1024 <= int(first) < int(last) < 65536):
        raise StackError(f"FIGMENT_PORTS is {text!r}; it names the first and the last port, e.g. {PORTS}")
    return range(int(first), int(last) + 1)


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
