"""The embedded stack on this machine: an S3 server, an MLflow server, a Ray head. `python -m infra.local --help`.

Everything lies in one folder that only this user may enter (`.figment` in the checkout, or FIGMENT_HOME): credentials,
ports, process ids, logs, the objects, the MLflow database. All servers listen on 127.0.0.1 and want a login.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NoReturn

from infra import processes
from infra.home import Credentials, Home, State, default_home
from infra.parts import NAMES, PARTS, environment, leftovers, make_server
from infra.plan import has_ports, plan, refuse_to_end_jobs, stale
from infra.private import private_folder_in_temp
from infra.processes import Running, Server, StackError


def up(home: Home, replace: bool = False) -> None:
    """Starts what does not run or is of no use any more. `StackError` when a part does not come up; the others stay.

    A Ray head with running jobs is ended only with `replace`; without, it is an error and nothing changes.
    """
    with _locked(home):
        state = State.load(home)
        made = plan(home, state)
        reasons = made.reasons
        if "ray" in reasons and not replace:
            refuse_to_end_jobs(home, state, made)
        all_servers = {part: make_server(part, home, state) for part in PARTS}
        for part in PARTS:
            if part not in reasons:
                print(f"  {_line(all_servers[part], state.running[part])}   (was up)", flush=True)
        for part, reason in reasons.items():
            if reason:
                _clear_away(part, reason, home, state)
        state.save(home)
        for move in made.moves:
            print(move, flush=True)
        if reasons:
            print(f"starting {', '.join(NAMES[part] for part in reasons)} …", flush=True)
            private_folder_in_temp(home.private_folder)
            for part in reasons:
                state.running[part] = processes.start(all_servers[part], home.log(part))
                state.save(home)
            _await([*reasons], all_servers, home, state)
        _say_login(home)


def status(home: Home) -> bool:
    """Prints one line a part, and the end of the log of a part that ended by itself. True when all serve."""
    state = State.load(home)
    if not has_ports(state) and not state.running:
        print("the embedded stack was never started: start it with `make stack`")
        return False
    fine = True
    for part in PARTS:
        problem, running = _problem(part, home, state), state.running.get(part)
        fine = fine and problem is None
        if problem is None and running:
            print(f"  {_line(make_server(part, home, state), running)}")
        else:
            print(f"  {NAMES[part]:<14} down   {problem}; `make stack` starts it again")
            if running:
                print(f"  the end of {home.log(part)}:\n{processes.tail(home.log(part))}")
    if fine:
        _say_login(home)
    return fine


def down(home: Home) -> None:
    """Ends what `up` started, whichever version did, and nothing else. Objects, runs, ports and credentials stay."""
    with _locked(home):
        state = State.load(home)
        for part, running in reversed([*state.running.items()]):
            there = processes.session(running)
            processes.stop(running, leftovers(part, state))
            print(f"  {NAMES.get(part, part):<14} {'stopped' if there else 'had ended'}", flush=True)
            del state.running[part]
            state.save(home)


def print_environment(home: Home) -> None:
    """Lines for a shell's `eval`."""
    state = State.load(home)
    if not has_ports(state):
        how = "was started by another version" if state.running else "was never started"
        raise StackError(f"the embedded stack {how}: start it with `make stack`")
    for name, value in environment(home, state).items():
        print(f"export {name}={shlex.quote(value)}")


def run(home: Home, command: Sequence[str]) -> NoReturn:
    """Becomes `command`, with the environment of the stack."""
    state = State.load(home)
    ended = [part for part in PARTS if part not in state.running or not processes.alive(state.running[part])]
    if ended:
        raise StackError(f"the embedded stack does not run ({', '.join(ended)} down): start it with `make stack`")
    bin_folder = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    env = {**os.environ, **environment(home, state), "PATH": f"{bin_folder}{os.pathsep}{path}"}
    try:
        os.execvpe(command[0], list(command), env)
    except (OSError, IndexError) as error:
        raise StackError(f"cannot run {' '.join(command) or 'nothing: give a command after --'} ({error})") from error


# --- parts of up and status -----------------------------------------------------------------------------------------


def _line(server: Server, running: Running) -> str:
    return f"{server.name:<14} up     {server.url}   pid {running.pid}"


def _say_login(home: Home) -> None:
    print(f"  the MLflow pages ask for a login: {Credentials.load(home).user}, password in {home.credentials_file}")


def _await(parts: Sequence[str], all_servers: Mapping[str, Server], home: Home, state: State) -> None:
    """Says when each serves, in the order in which they do; `StackError` names those that never did."""
    began, lock, problems = time.monotonic(), Lock(), []

    def remember(part: str, again: Running) -> None:
        with lock:
            state.running[part] = again
            state.save(home)

    def wait(part: str) -> Running:
        told = functools.partial(remember, part)
        return processes.wait_or_start_again(all_servers[part], state.running[part], home.log(part), told)

    with ThreadPoolExecutor(len(parts)) as pool:
        waits = {pool.submit(wait, part): part for part in parts}
        for each in as_completed(waits):
            try:
                line = _line(all_servers[waits[each]], each.result())
                print(f"  {line}   (after {time.monotonic() - began:.0f} s)", flush=True)
            except StackError as error:
                problems.append(str(error))
    if problems:
        raise StackError("\n".join(problems))


def _problem(part: str, home: Home, state: State) -> str | None:
    """Why the part does not serve, as far as one question tells; None when it does."""
    running = state.running.get(part)
    if running is None:
        return "not started"
    return stale(part, home, state, running) or processes.why_silent(make_server(part, home, state), running, 0)


def _clear_away(part: str, reason: str, home: Home, state: State) -> None:
    """Ends what is left of a part that is going to be started again, and says why."""
    print(f"the {NAMES[part]} is started again, because {reason}; the end of {home.log(part)}:", flush=True)
    print(processes.tail(home.log(part)), flush=True)
    running = state.running.pop(part)
    processes.stop(running, leftovers(part, state))  # also what it forked and left behind


@contextmanager
def _locked(home: Home) -> Iterator[None]:
    """One command at a time changes a stack."""
    home.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (home.folder, home.folder / "logs"):
        if folder.exists():
            folder.chmod(0o700)  # as it should be; an earlier version let others read logs
    with (home.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another command is changing the stack; waiting for it …", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infra.local",
        description="The embedded stack on 127.0.0.1: an S3 server, an MLflow server, a Ray head.",
        epilog="FIGMENT_HOME names its folder; by default it is .figment in the checkout.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    starter = commands.add_parser("up", help="start what does not run, wait until all do their work")
    starter.add_argument("--replace", action="store_true", help="even when the Ray head must be replaced and runs jobs")
    commands.add_parser("down", help="stop what `up` started; data and credentials stay")
    commands.add_parser("status", help="one line a part; exit code 1 when one is down")
    commands.add_parser("env", help='print the environment for a shell: eval "$(python -m infra.local env)"')
    runner = commands.add_parser("run", help="run a command with that environment: run -- CMD …")
    runner.add_argument("cmd", nargs=argparse.REMAINDER, metavar="-- CMD")
    chosen = parser.parse_args(arguments)
    home = default_home()
    try:
        if chosen.command == "up":
            up(home, chosen.replace)
        elif chosen.command == "down":
            down(home)
        elif chosen.command == "env":
            print_environment(home)
        elif chosen.command == "run":
            run(home, [word for index, word in enumerate(chosen.cmd) if index or word != "--"])
        elif not status(home):
            return 1
        return 0
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
