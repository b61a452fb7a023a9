"""The embedded stack on this machine: an S3 server, an MLflow server, a Ray head. `python -m infra.local --help`.

Everything lies in one folder that only this user may enter (`.figment` in the checkout, or FIGMENT_HOME): credentials,
ports, process ids, logs, the objects, the MLflow database. All servers listen on 127.0.0.1 and want a login.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from infra import processes, servers
from infra.home import Credentials, Home, State, default_home
from infra.processes import Running, Server, StackError

PARTS = ("s3", "mlflow", "ray")
PORTS = {"s3": servers.S3_PORTS, "mlflow": servers.MLFLOW_PORTS, "ray": servers.RAY_PORTS}
STORE = f"s3://{servers.BUCKET}"


def environment(home: Home, state: State) -> dict[str, str]:
    """What a process needs to use the stack: storage, tracking, cluster. Holds secrets."""
    keys, port = Credentials.load(home), state.ports
    endpoint = f"http://{servers.HOST}:{port['s3']}"
    return {
        "AWS_ACCESS_KEY_ID": keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys.secret_key,
        "AWS_REGION": servers.REGION,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "FIGMENT_STORE": STORE,
        "MLFLOW_TRACKING_URI": f"http://{servers.HOST}:{port['mlflow']}",
        "MLFLOW_TRACKING_USERNAME": keys.user,
        "MLFLOW_TRACKING_PASSWORD": keys.password,
        "RAY_ADDRESS": f"{servers.HOST}:{port['ray']}",
        "RAY_API_SERVER_ADDRESS": f"http://{servers.HOST}:{port['dashboard']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home.token_file),
        **servers.QUIET,
    }


def make_server(part: str, home: Home, state: State) -> Server:
    keys, env = Credentials.load(home), environment(home, state)
    if part == "s3":
        return servers.s3_server(home.folder / "s3", state.ports, keys.access_key, keys.secret_key)
    if part == "mlflow":
        storage = {name: value for name, value in env.items() if name.startswith("AWS_")}
        return servers.mlflow_server(
            home.folder / "mlflow",
            state.ports["mlflow"],
            f"{STORE}/mlflow",
            storage,
            (keys.user, keys.password),
            keys.session_key,
        )
    inherited = {name: value for name, value in env.items() if not name.startswith("RAY_A")}
    return servers.ray_head(home.ray_folder, state.ports, inherited, home.token_file)


def up(home: Home) -> None:
    """Starts what does not run. `StackError` when a part does not come up; what came up stays."""
    with _locked(home):
        state = State.load(home)
        unknown = [part for part in PARTS if _fill_ports(part, state)]
        down_parts = [part for part in PARTS if not _serves(part, home, state, known=part not in unknown)]
        moved = [part for part in down_parts if _leave_taken_ports(part, state)]
        if (unknown or moved) and "ray" not in down_parts:
            print("the Ray head must learn the new ports: it is started again", flush=True)
            down_parts.append("ray")
        if "ray" in down_parts and "ray" in state.running:
            processes.stop(state.running.pop("ray"))
        state.save(home)
        all_servers = {part: make_server(part, home, state) for part in PARTS}
        for part in PARTS:
            if part not in down_parts:
                print(f"  {_line(all_servers[part], state.running[part])}   (was up)", flush=True)
        if not down_parts:
            _say_login(home)
            return
        print(f"starting {', '.join(all_servers[part].name for part in down_parts)} …", flush=True)
        for part in down_parts:
            if part == "ray":
                _fresh_private_folder(home.ray_folder)
            state.running[part] = processes.start(all_servers[part], home.log(part))
            state.save(home)
        _await([(all_servers[part], state.running[part], home.log(part)) for part in down_parts])
        _say_login(home)


def status(home: Home) -> bool:
    """Prints one line a part, and the end of the log of a part that ended by itself. True when all serve."""
    state = State.load(home)
    if not _has_ports(state):
        print("the embedded stack was never started: start it with `make stack`")
        return False
    fine = True
    for part in PARTS:
        server, running = make_server(part, home, state), state.running.get(part)
        problem = _problem(server, running)
        fine = fine and problem is None
        if problem is None and running:
            print(f"  {_line(server, running)}")
        else:
            print(f"  {server.name:<14} down   {server.url}   {problem}; `make stack` starts it again")
            if running:
                print(f"  the end of {home.log(part)}:\n{processes.tail(home.log(part))}")
    if fine:
        _say_login(home)
    return fine


def down(home: Home) -> None:
    """Ends what `up` started, and nothing else. Objects, runs, ports and credentials stay."""
    with _locked(home):
        state = State.load(home)
        for part in reversed(PARTS):
            running = state.running.get(part)
            if running is None:
                continue
            server = make_server(part, home, state)
            there = processes.session(running)
            processes.stop(running, server.leftovers)
            print(f"  {server.name:<14} {'stopped' if there else 'had ended'}", flush=True)
            del state.running[part]
            state.save(home)


def print_environment(home: Home) -> None:
    """Lines for a shell's `eval`."""
    state = State.load(home)
    if not _has_ports(state):
        raise StackError("the embedded stack was never started: start it with `make stack`")
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


def _await(started: Sequence[tuple[Server, Running, Path]]) -> None:
    """Says when each serves, in the order in which they do; `StackError` names those that never did."""
    problems = []
    with ThreadPoolExecutor(len(started)) as pool:
        waits = {pool.submit(processes.wait_until_serving, *each): each for each in started}
        for wait in as_completed(waits):
            server, running, _ = waits[wait]
            try:
                print(f"  {_line(server, running)}   (after {wait.result():.0f} s)", flush=True)
            except StackError as error:
                problems.append(str(error))
    if problems:
        raise StackError("\n".join(problems))


def _problem(server: Server, running: Running | None) -> str | None:
    """Why the part does not serve; None when it does."""
    if running is None:
        return "not started"
    if not processes.alive(running):
        return f"it ended by itself (pid {running.pid})"
    try:
        server.check()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        return f"pid {running.pid} runs but does not answer: {error}"
    return None


def _serves(part: str, home: Home, state: State, known: bool) -> bool:
    """Whether the part is up at its `known` ports. One that ended is reported, one that hangs is stopped."""
    running = state.running.get(part)
    if running is None:
        return False
    server = make_server(part, home, state)
    problem = _problem(server, running) if known else "it was started by another version"
    if problem is None:
        return True
    print(f"the {server.name} is started again, because {problem}; the end of {home.log(part)}:", flush=True)
    print(processes.tail(home.log(part)), flush=True)
    processes.stop(running, server.leftovers)  # also what it forked and left behind
    del state.running[part]
    return False


def _has_ports(state: State) -> bool:
    return all(name in state.ports for names in PORTS.values() for name in names)


def _fill_ports(part: str, state: State) -> bool:
    """Gives the part the ports that it has not yet; True when there were such."""
    missing = [name for name in PORTS[part] if name not in state.ports]
    for name in missing:
        state.ports |= processes.free_ports([name], _partner(name), apart_from=state.ports.values())
    return bool(missing)


def _leave_taken_ports(part: str, state: State) -> bool:
    """Chooses again for a part that is about to start where another program listens by now; True when it had to."""
    taken = [name for name in PORTS[part] if not _free(name, state.ports[name])]
    for name in taken:
        old = state.ports.pop(name)
        state.ports |= processes.free_ports([name], _partner(name), apart_from=[old, *state.ports.values()])
        print(f"port {old} ({name}) is used by another program: {state.ports[name]} from now on", flush=True)
    return bool(taken)


def _partner(name: str) -> int:
    return servers.S3_ADMIN_PARTNER if name == "s3_admin" else 0


def _free(name: str, port: int) -> bool:
    return all(processes.port_is_free(p) for p in {port, port + _partner(name)})


def _fresh_private_folder(folder: Path) -> None:
    """An empty folder in the shared temp folder that nobody else owns or may enter."""
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
        raise StackError(f"{folder} belongs to someone else: have it removed, or set TMPDIR to another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)


@contextmanager
def _locked(home: Home) -> Iterator[None]:
    """One command at a time changes a stack."""
    home.folder.mkdir(parents=True, exist_ok=True)
    home.folder.chmod(0o700)
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
    commands.add_parser("up", help="start what does not run, wait until all serve")
    commands.add_parser("down", help="stop what `up` started; data and credentials stay")
    commands.add_parser("status", help="one line a part; exit code 1 when one is down")
    commands.add_parser("env", help='print the environment for a shell: eval "$(python -m infra.local env)"')
    runner = commands.add_parser("run", help="run a command with that environment: run -- CMD …")
    runner.add_argument("cmd", nargs=argparse.REMAINDER, metavar="-- CMD")
    chosen = parser.parse_args(arguments)
    home = default_home()
    try:
        if chosen.command == "up":
            up(home)
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
