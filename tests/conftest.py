"""Real servers for the tests: one Ray cluster, one S3 server, one MLflow server a session, each started on demand."""
# ruff: noqa: E402 - the environment comes before the imports that read it

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

# Ray and torch read these when they are imported, and the processes of tests inherit them. One thread each: the threads
# of several processes wait for one another in turns that cost more than they compute (a toy GAN took 46 s and not 2).
os.environ.update(
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # Ray's name for: stay on 127.0.0.1
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
)
# Nothing of the person who runs the tests: no cluster, no store, no tracking server, no cloud account.
for _name in [*os.environ]:
    if _name.startswith(("AWS_", "MLFLOW_TRACKING_", "FIGMENT_", "RAY_ADDRESS", "RAY_API_")):
        del os.environ[_name]

# Each process of `pytest -n` has ports of its own: between the choice of a port and its use others choose as well.
_first = 20_000 + 2_500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10_000
_for_s3 = range(_first, _first + 300)  # chosen below, used whenever the server starts
os.environ["FIGMENT_PORTS"] = f"{_for_s3.stop}-{_first + 2_499}"

import hypothesis
import pytest
from pyarrow import fs as pafs

from infra import servers
from infra.private import write_secret
from infra.processes import free_ports, start, stop, wait_or_start_again, wait_until_serving
from infra.servers import BUCKET, MLFLOW_PORTS, RAY_PORTS, REGION, S3_ADMIN_PARTNER, S3_PORTS
from infra.storage import open_storage
from tests.grouping import ByServer, order_of

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("figment", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("figment")

# Chosen now and not when the S3 server starts, so that a Ray cluster which starts earlier hands them to its workers.
S3 = free_ports(S3_PORTS, partner=S3_ADMIN_PARTNER, among=_for_s3)
os.environ["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{S3['s3']}"
os.environ["AWS_REGION"] = REGION
os.environ["AWS_ACCESS_KEY_ID"] = f"test{secrets.token_hex(8)}"
os.environ["AWS_SECRET_ACCESS_KEY"] = secrets.token_hex(20)


SERVERS = {"ray_cluster", "s3_endpoint", "mlflow_server", "stack"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that need a server (`make test-fast` leaves them out), and sorts those that share one first."""
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {}).values()
        if SERVERS & {*getattr(item, "fixturenames", ())} or any(
            isinstance(value, str) and value == "s3"
            for value in given  # asked for by a fixture when it runs
        ):
            item.add_marker("servers")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: order_of(item.nodeid.partition("::")[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByServer:
    return ByServer(config, log)


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A private folder with a short path: unix sockets lie in it, and pytest's own folders are too deep for them."""
    folder = Path(tempfile.mkdtemp(prefix="figment-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory, short_folder: Path) -> Iterator[str]:
    """The address of the one Ray cluster of the session; this process is connected to it. 4 CPUs are declared.

    A head as the stack has one and not `ray.init(address="local")`, which leaves some ports (the job agent's 52365, two
    of metrics) where every other cluster of the machine has them: of two test sessions at once, one got no jobs done.
    """
    import ray

    folder = tmp_path_factory.mktemp("ray")
    ports = free_ports(RAY_PORTS)
    token_file = folder / "token"
    write_secret(token_file, os.environ["RAY_AUTH_TOKEN"])
    told = {name: os.environ[name] for name in os.environ if name.startswith("RAY_TRAIN_")}
    head = servers.ray_head(short_folder / "r", ports, told, token_file, cpus=4, object_store=300 * 2**20)
    running = start(head, folder / "log")
    try:
        running = wait_or_start_again(head, running, folder / "log")
        address = f"{servers.HOST}:{ports['ray']}"
        ray.init(address=address, log_to_driver=False)
        yield address
        ray.shutdown()
    finally:
        stop(running)


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory, short_folder: Path) -> Iterator[str]:
    """A real S3 server (SeaweedFS); AWS_* of the session point to it."""
    folder = tmp_path_factory.mktemp("s3")
    server = servers.s3_server(
        folder / "data", S3, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"], short_folder
    )
    running = start(server, folder / "log")
    try:
        wait_until_serving(server, running, folder / "log")
        yield server.url
    finally:
        stop(running, server.leftovers)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a real MLflow server on SQLite, artifacts proxied to a folder, without login."""
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(MLFLOW_PORTS).values()
    server = servers.mlflow_server(folder, port, f"file://{folder}/artifacts", storage={})
    running = start(server, folder / "log")
    try:
        wait_until_serving(server, running, folder / "log")
        yield server.url
    finally:
        stop(running)


@pytest.fixture
def s3_store(s3_endpoint: str) -> tuple[str, pafs.FileSystem]:
    """(url, filesystem) of a fresh prefix in the real S3 server."""
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    return url, open_storage(url)


@pytest.fixture
def store(tmp_path: Path) -> pafs.FileSystem:
    """A fresh local folder as a storage."""
    return open_storage(str(tmp_path / "store"))
