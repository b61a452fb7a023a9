"""How each server of the embedded stack is started, and how one sees that it serves. All listen on 127.0.0.1 alone."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
from pyarrow import fs as pafs

from infra import certificates, checks
from infra.private import empty_folder, write_secret
from infra.processes import Server

BUCKET = "figment"
REGION = "us-east-1"
HOST = "127.0.0.1"

S3_PORTS = ("s3", "s3_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc", "s3_admin")
S3_ADMIN_PARTNER = 10000  # the server's own worker looks for the admin port that far above, whatever is asked for
MLFLOW_PORTS = ("mlflow",)
RAY_PORTS = (
    *("ray", "dashboard", "agent", "agent_grpc", "ray_client"),
    *("ray_metrics", "node_manager", "object_manager", "runtime_env", "autoscaler_metrics", "dashboard_metrics"),
)

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Ray tells every job that it started more processes than there are CPUs. They are small, and it is meant so.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started on node",
    # How often Ray asks each training worker whether it is well, 2 s by default. A finished run waits for the next
    # question; each question takes the interpreter lock from training (docs/results.md).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Else Ray turns 127.0.0.1 into the address of the network card, where the stack does not listen.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""No telemetry, few words, loopback: for the servers and for every process that talks to them."""


def program(name: str) -> str:
    """A command of the environment that runs this Python."""
    return str(Path(sys.executable).with_name(name))


def s3_leftovers(ports: Mapping[str, int]) -> list[Path]:
    """The unix sockets that SeaweedFS has beside its gRPC ports, in /tmp whatever it is told; a kill leaves them there.

    Their mode, and the certificates, keep everybody else out.
    """
    grpc = {part: ports.get(f"{part}_grpc") for part in ("s3", "master", "volume", "filer")}
    admin = ports.get("s3_admin")
    grpc["admin"] = admin + S3_ADMIN_PARTNER if admin else None
    return [Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock") for part, port in grpc.items() if port]


def s3_server(folder: Path, ports: Mapping[str, int], access_key: str, secret_key: str, sockets: Path) -> Server:
    """SeaweedFS as one process, with bucket `figment`; `ports` has a free port for each of `S3_PORTS`.

    `sockets` is a folder that only this user may enter, with a short path. All ports but S3's want a certificate.
    """
    options = {
        "dir": folder,
        "ip": HOST,
        "ip.bind": HOST,
        "bucket": BUCKET,
        "s3.port": ports["s3"],
        "s3.port.grpc": ports["s3_grpc"],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": sockets / "s3.sock",
        "filer.localSocket": sockets / "filer.sock",
        "s3.autoCreateBucket": "false",  # a typing error in a bucket's name must not make a bucket
        "master.port": ports["master"],
        "master.port.grpc": ports["master_grpc"],
        "master.telemetry": "false",
        "volume.port": ports["volume"],
        "volume.port.grpc": ports["volume_grpc"],
        "filer.port": ports["filer"],
        "filer.port.grpc": ports["filer_grpc"],
        "admin.port": ports["s3_admin"],
        "admin.ui": "false",
        "webdav": "false",
    }
    command = [program("weed"), "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in options.items())]
    endpoint = f"{HOST}:{ports['s3']}"

    def client() -> pafs.FileSystem:
        return pafs.S3FileSystem(
            access_key=access_key,
            secret_key=secret_key,
            region=REGION,
            endpoint_override=endpoint,
            scheme="http",
            connect_timeout=2,
            request_timeout=10,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
        )

    keys = folder / "tls"
    environment = {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}
    environment |= certificates.environment(keys)
    # Behind the certificates, a second lock: the volume server and the filer serve who brings a signature alone.
    for name in ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ"):
        environment[f"WEED_JWT_{name}_KEY"] = secrets.token_hex(24)

    def prepare() -> None:
        sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        certificates.ensure(keys)

    return Server(
        "S3 server",
        f"http://{endpoint}",
        command,
        environment,
        folder,
        answers=lambda: checks.s3_answers(client(), BUCKET),
        works=lambda: checks.s3_works(client(), BUCKET),
        prepare=prepare,
        leftovers=[*s3_leftovers(ports), sockets / "s3.sock", sockets / "filer.sock"],
    )


def mlflow_server(
    folder: Path,
    port: int,
    artifacts: str,
    storage: Mapping[str, str],
    login: tuple[str, str] | None = None,
    session_key: str = "",
) -> Server:
    """MLflow on SQLite in `folder`; artifacts go to `artifacts`: `s3://…` with the AWS_* of `storage`, or a folder.

    With `login` (user, password) whoever has no login is refused, also from the pages.
    """
    command = [program("mlflow"), "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", artifacts]
    command += ["--uvicorn-opts", "--log-level warning"]
    # Its job runners are for evaluating language models; they cost 800 MB.
    environment = {**QUIET, **storage, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    header: dict[str, str] = {}
    config, text = folder / "auth.ini", ""
    if login:
        user, password = login
        text = (
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{folder}/auth.db\n"
            f"admin_username = {user}\nadmin_password = {password}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            # Else every request is answered only after a slow hash of the password: .15 s of a core that trains.
            "auth_cache_ttl_seconds = 600\n"
        )
        command += ["--app-name", "basic-auth"]
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": session_key}
        header = checks.basic_auth(user, password)
    url = f"http://{HOST}:{port}"
    return Server(
        "MLflow server",
        url,
        command,
        environment,
        folder,
        answers=lambda: checks.mlflow_answers(url, header),
        works=lambda: checks.mlflow_works(url, header),
        prepare=lambda: write_secret(config, text) if login else None,
    )


def ray_head(
    folder: Path,
    ports: Mapping[str, int],
    environment: Mapping[str, str],
    token_file: Path,
    cpus: int,
    object_store: int,
) -> Server:
    """A Ray head with its job server, its state in `folder` (a short path: it holds unix sockets).

    Ray lets everybody write there (the code of jobs lies in it), so `folder` must be inside of a private one. Jobs and
    workers inherit `environment`, so that no secret has to travel in a runtime_env. Who has no token is refused at all
    ports; three of them show metrics to everybody: names of tasks and numbers, no argument, no result, no secret.
    """
    options = {
        "node-ip-address": HOST,
        "port": ports["ray"],
        "dashboard-host": HOST,
        "dashboard-port": ports["dashboard"],
        "dashboard-agent-listen-port": ports["agent"],
        "dashboard-agent-grpc-port": ports["agent_grpc"],
        "metrics-export-port": ports["ray_metrics"],
        "node-manager-port": ports["node_manager"],
        "object-manager-port": ports["object_manager"],
        "runtime-env-agent-port": ports["runtime_env"],
        "ray-client-server-port": ports["ray_client"],  # of no use here, but it cannot be left out
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": cpus,
        "object-store-memory": object_store,
        "temp-dir": folder,
    }
    command = [program("ray"), "start", "--head", "--block", "--disable-usage-stats", "--log-color=false"]
    command += [f"--{name}={value}" for name, value in options.items()]
    own = {
        **QUIET,
        **environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "AUTOSCALER_METRIC_PORT": str(ports["autoscaler_metrics"]),  # else one and the same for every cluster
        "DASHBOARD_METRIC_PORT": str(ports["dashboard_metrics"]),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else `down` waits half a minute for jobs that it ends anyway
        "RAY_worker_niceness": "0",  # Ray's 15 lets every server beside them slow the training workers
        "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",
        "PYTHONUNBUFFERED": "1",  # the log of a job is followed live
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    url = f"http://{HOST}:{ports['dashboard']}"

    def header() -> dict[str, str]:
        return {"Authorization": f"Bearer {token_file.read_text().strip()}"}

    return Server(
        "Ray head",
        url,
        command,
        own,
        folder,
        answers=lambda: checks.ray_answers(url, header()),
        works=lambda: checks.ray_works(url, header()),
        # It gives its own parts 30 s to come up and then gives up, which is too little on a machine under load.
        starts=3,
        prepare=lambda: empty_folder(folder),
        umask=-1,  # a job's pictures are as readable as its user's umask makes them
        # A head that is told of another cluster would not be a head.
        without=("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"),
    )


def declared_cpus() -> int:
    """More than there are: the tasks that read data must find a place beside the training workers."""
    return max(4, 2 * (os.cpu_count() or 1))


def object_store_bytes() -> int:
    """1 GiB, less on a small machine or with a small /dev/shm (images stream; nothing large has to stay in memory)."""
    size = min(2**30, psutil.virtual_memory().total // 8)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        if free > 200 * 2**20:
            return min(size, int(free * 0.6))
        return min(size, 256 * 2**20)  # too little to use: Ray goes to its temp-dir
    return size
