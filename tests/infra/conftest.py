"""The embedded stack for the tests of this folder: started once, used by test_doors.py, then by test_local.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra import processes
from infra.home import Credentials, Home, State

ROOT = Path(__file__).resolve().parents[2]


class Stack:
    def __init__(self, folder: Path, temp: Path):
        self.home = Home(folder)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_AUTH"))}
        self.env |= {"FIGMENT_HOME": str(folder), "TMPDIR": str(temp), "PYTHONPATH": str(ROOT)}

    def command(self, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra.local", *words]
        return subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=400, check=False)

    def python(self, code: str) -> str:
        """What a program says that has the environment of the stack."""
        done = self.command("run", "--", sys.executable, "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """(part, process) of all that runs now; workers of Ray come and go."""
        return [(part, each) for part, running in self.state.running.items() for each in processes.session(running)]

    @property
    def private(self) -> Path:
        """The folder of unix sockets and of Ray, where the commands see it: they have another TMPDIR than the tests."""
        return Path(self.env["TMPDIR"]) / self.home.private_folder.name

    @property
    def state(self) -> State:
        return State.load(self.home)

    @property
    def credentials(self) -> Credentials:
        return Credentials.load(self.home)

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.state.ports[port]}"


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    # Not below pytest's own temp folder: the paths of unix sockets may not be long.
    temp = Path(os.path.realpath("/tmp")) / f"f-{os.getpid()}"
    temp.mkdir(mode=0o755)  # as open as a temp folder is
    one = Stack(tmp_path_factory.mktemp("stack") / "home", temp)
    try:
        assert one.command("status").returncode == 1
        assert "make stack" in one.command("run", "--", "true").stderr
        came_up = one.command("up")
        assert came_up.returncode == 0, came_up.stdout + came_up.stderr
        yield one
    finally:
        for running in one.state.running.values():
            processes.stop(running)
        subprocess.run(["rm", "-r", str(temp)], check=True)
