"""The three parts of the embedded stack as servers, and what a process needs to use them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from infra import servers
from infra.home import Credentials, Home, State
from infra.processes import Server

PARTS = ("s3", "mlflow", "ray")
NAMES = {"s3": "S3 server", "mlflow": "MLflow server", "ray": "Ray head"}
PORTS = {"s3": servers.S3_PORTS, "mlflow": servers.MLFLOW_PORTS, "ray": servers.RAY_PORTS}
STORE = f"s3://{servers.BUCKET}"

SETUP = 2
"""Raised when a part is started in another way than before, so that `up` starts again what an earlier version started.
1: no certificates, Ray's folder open to everybody."""


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
    """Describes the part; writes nothing and starts nothing."""
    keys, env = Credentials.load(home), environment(home, state)
    if part == "s3":
        folder, sockets = home.folder / "s3", home.private_folder
        server = servers.s3_server(folder, state.ports, keys.access_key, keys.secret_key, sockets)
        learned: object = [str(sockets), keys.access_key, keys.secret_key]
    elif part == "mlflow":
        storage = {name: value for name, value in env.items() if name.startswith("AWS_")}
        port, login = state.ports["mlflow"], (keys.user, keys.password)
        folder, artifacts = home.folder / "mlflow", f"{STORE}/mlflow"
        server = servers.mlflow_server(folder, port, artifacts, storage, login, keys.session_key)
        learned = [storage, login]
    else:
        inherited = {name: value for name, value in env.items() if not name.startswith("RAY_A")}
        cpus, memory = servers.declared_cpus(), servers.object_store_bytes()
        server = servers.ray_head(home.ray_folder, state.ports, inherited, home.token_file, cpus, memory)
        learned = [str(home.ray_folder), inherited]
    ports = {name: state.ports[name] for name in PORTS[part]}
    digest = hashlib.sha256(json.dumps([SETUP, ports, learned], sort_keys=True).encode()).hexdigest()[:16]
    return replace(server, told=digest)


def leftovers(part: str, state: State) -> Sequence[Path]:
    """Files outside of the folder of the stack that the part leaves behind, as far as `state` knows its ports."""
    return servers.s3_leftovers(state.ports) if part == "s3" else []
