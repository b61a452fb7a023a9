"""What one stack on this machine keeps in its folder: which ports, which processes, which credentials."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from infra.private import write_secret
from infra.processes import Running
from infra.storage import local_path

SOCKET_PATH = 103
"""Characters that the path of a unix socket may have (one less than macOS has room for)."""

RAY_SOCKET = "/session_2026-01-02_03-04-05_678901_1234567/sockets/dash_MetricsHead"
"""The longest that Ray makes below its temp dir."""


@dataclass(frozen=True)
class Home:
    """The folder of one stack."""

    folder: Path

    @property
    def state_file(self) -> Path:
        return self.folder / "state.json"

    @property
    def credentials_file(self) -> Path:
        return self.folder / "credentials.json"

    @property
    def token_file(self) -> Path:
        return self.folder / "ray-token"

    def log(self, part: str) -> Path:
        return self.folder / "logs" / f"{part}.log"

    @property
    def private_folder(self) -> Path:
        """For unix sockets: their paths must be short, so they lie neither in `folder` nor in a long TMPDIR."""
        name = f"figment-{os.getuid()}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}"
        wanted = Path(tempfile.gettempdir()) / name
        return wanted if len(f"{wanted}/r{RAY_SOCKET}") <= SOCKET_PATH else Path("/tmp") / name

    @property
    def ray_folder(self) -> Path:
        # One level inside: Ray makes its folder, and those where the code of jobs lies, writable for everybody.
        return self.private_folder / "r"


def default_home() -> Home:
    chosen = os.environ.get("FIGMENT_HOME")
    return Home(local_path(chosen) if chosen else Path(__file__).resolve().parents[1] / ".figment")


@dataclass
class State:
    """What is remembered between commands."""

    ports: dict[str, int]
    running: dict[str, Running]

    @staticmethod
    def load(home: Home) -> State:
        if not home.state_file.exists():
            return State({}, {})
        body = json.loads(home.state_file.read_text())
        known = {field.name for field in fields(Running)}  # another version may have written more
        running = {
            part: Running(**{name: value for name, value in values.items() if name in known})
            for part, values in body["running"].items()
        }
        return State(body["ports"], running)

    def save(self, home: Home) -> None:
        body = {"ports": self.ports, "running": {part: asdict(value) for part, value in self.running.items()}}
        write_secret(home.state_file, json.dumps(body, indent=2))


@dataclass(frozen=True)
class Credentials:
    access_key: str
    secret_key: str
    user: str  # of MLflow
    password: str
    session_key: str  # signs MLflow's forms

    def __repr__(self) -> str:
        return "Credentials(***)"

    @staticmethod
    def load(home: Home) -> Credentials:
        """The credentials of the stack; made when there are none."""
        if not home.credentials_file.exists():
            made = Credentials(
                access_key=secrets.token_hex(10),
                secret_key=secrets.token_hex(20),
                user="figment",
                password=secrets.token_hex(16),
                session_key=secrets.token_hex(24),
            )
            write_secret(home.token_file, secrets.token_hex(32))
            write_secret(home.credentials_file, json.dumps(asdict(made), indent=2))
        return Credentials(**json.loads(home.credentials_file.read_text()))
