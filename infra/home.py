"""What one stack on this machine keeps in its folder: which ports, which processes, which credentials."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.processes import Running
from infra.servers import write_secret


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
    def ray_folder(self) -> Path:
        # Ray puts unix sockets there, whose paths may have 103 characters: so it cannot be inside of `folder`, nor in a
        # long TMPDIR.
        temp = tempfile.gettempdir()
        name = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        return Path(temp if len(temp) <= 20 else "/tmp") / f"figment-{os.getuid()}-{name}"


def default_home() -> Home:
    chosen = os.environ.get("FIGMENT_HOME")
    return Home(Path(chosen).expanduser().absolute() if chosen else Path(__file__).resolve().parents[1] / ".figment")


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
        return State(body["ports"], {part: Running(**value) for part, value in body["running"].items()})

    def save(self, home: Home) -> None:
        body = {"ports": self.ports, "running": {part: asdict(value) for part, value in self.running.items()}}
        fresh = home.state_file.with_suffix(".new")
        fresh.write_text(json.dumps(body, indent=2))
        fresh.replace(home.state_file)


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
