"""Who has no key, another user of the machine or a web page, finds every door of the stack shut."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import certificates
from infra.servers import program

INTRUDER = Path(__file__).with_name("intruder.py")
REQUESTS = [
    ("GET", "/"),
    ("GET", "/metrics"),
    ("GET", "/debug/pprof/cmdline"),
    # SeaweedFS: the master, the volume server, the filer, the admin
    ("GET", "/dir/status"),
    ("GET", "/dir/assign"),
    ("GET", "/dir/lookup?volumeId=1&fileId=1,01&read=yes"),
    ("GET", "/col/delete?collection=figment"),
    ("GET", "/vol/vacuum"),
    ("GET", "/status"),
    ("GET", "/1,01"),
    ("GET", "/buckets/figment/"),
    ("DELETE", "/buckets/figment/kept?recursive=true"),
    ("GET", "/figment"),
    ("DELETE", "/figment/kept/door"),
    # MLflow
    ("POST", "/api/2.0/mlflow/experiments/search"),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts"),
    ("GET", "/ajax-api/2.0/mlflow/users/current"),
    # Ray: the job server, its agents
    ("GET", "/api/jobs/"),
    ("POST", "/api/jobs/"),
    ("GET", "/api/job_agent/jobs/"),
    ("POST", "/api/job_agent/jobs/"),
    ("GET", "/api/v0/logs"),
    ("GET", "/logs"),
    ("GET", "/nodes?view=summary"),
    ("GET", "/worker/traceback?pid=1"),
    ("POST", "/get_or_create_runtime_env"),
    ("POST", "/get_runtime_envs_info"),
]
METRICS = ("ray_metrics", "autoscaler_metrics", "dashboard_metrics")
"""What these show to everybody is numbers (`servers.ray_head`)."""


@pytest.fixture(scope="module")
def kept(stack) -> None:
    code = (
        "from infra.storage import default_store, open_storage; from pipelines.objects import write_object\n"
        "write_object(open_storage(default_store()), 'kept/door', b'behind the door' * 1000)"
    )
    stack.python(code)


@pytest.fixture(scope="module")
def doors(stack) -> dict[str, Any]:
    """Every socket that any process of the stack listens at: port -> part, and the paths of unix sockets."""
    deadline = time.monotonic() + 300
    while True:
        ports, sockets, titles = _listening(stack)
        if "ray::IDLE" in titles:  # the ports of workers are among them; Ray starts and ends spare ones as it likes
            return {"ports": ports, "sockets": sorted(sockets)}
        assert time.monotonic() < deadline, f"no worker of Ray among {sorted(titles)}"
        time.sleep(0.5)


def _listening(stack) -> tuple[dict[int, str], set[str], set[str]]:
    """(port -> part, unix sockets, first words of the processes' titles)."""
    ports, sockets, titles = {}, set(), set()
    for part, process in stack.processes():
        try:
            connections, title = process.net_connections(kind="all"), " ".join(process.cmdline()) or process.name()
        except psutil.NoSuchProcess:
            continue  # a spare worker that ended
        for connection in connections:
            if connection.family == socket.AF_UNIX:
                # A connection that a socket accepted has its path as well: one more that must not open.
                sockets |= {connection.laddr} if connection.laddr else set()
            elif connection.status == psutil.CONN_LISTEN:
                ports[connection.laddr.port] = part
                titles.add(title.split()[0])
    return ports, sockets, titles


@pytest.fixture(scope="module")
def intruder(stack, doors, kept) -> dict[str, Any]:
    """What the intruder was told at every door."""
    state = stack.state
    task = {
        "weed": program("weed"),
        "ports": sorted(doors["ports"]),
        "requests": REQUESTS,
        "grpc": sorted(port for port, part in doors["ports"].items() if part == "ray"),
        "sockets": doors["sockets"],
        "folders": [
            str(path) for path in (stack.home.folder, stack.home.folder / "logs", stack.private, stack.private / "r")
        ],
        "master": f"127.0.0.1:{state.ports['master']}.{state.ports['master_grpc']}",
        "shell": ["fs.ls /buckets/figment/kept\n", "lock\nfs.rm -rf /buckets/figment/kept\n"],
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "WEED_"))}
    done = subprocess.run(
        [sys.executable, str(INTRUDER)],
        input=json.dumps(task), env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    if os.getuid() == 0:
        assert told["uid"] != 0
    return told


def test_no_port_gives_anything_to_who_has_no_key(stack, intruder):
    ports = {port: name for name, port in stack.state.ports.items()}
    keys = stack.credentials
    hidden = [keys.secret_key, keys.access_key, keys.password, stack.home.token_file.read_text(), str(stack.private)]
    opened = defaultdict(set)
    for answer in intruder["http"]:
        assert not any(secret in answer["body"] for secret in hidden), answer
        if 200 <= answer["status"] < 400:
            opened[ports.get(answer["port"])].add((answer["scheme"], answer["method"], answer["path"]))
            if ports.get(answer["port"]) in METRICS:
                assert answer["body"].startswith("# HELP")
    for name in METRICS:
        del opened[name]
    # The page of Ray's dashboard is a program that asks for the token; nothing of the cluster is in it. SeaweedFS's S3
    # says at /status that it is well, with no body.
    assert opened == {"dashboard": {("http", "GET", "/")}, "s3": {("http", "GET", "/status")}}
    s3 = [answer for answer in intruder["http"] if answer["port"] == stack.state.ports["s3"]]
    assert {answer["body"] for answer in s3 if answer["status"] == 200} == {""}


def test_the_servers_behind_s3_want_a_certificate(stack, doors, intruder):
    behind = {port for port, part in doors["ports"].items() if part == "s3"} - {stack.state.ports["s3"]}
    assert len(behind) >= 9
    answers = [answer for answer in intruder["http"] if answer["port"] in behind]
    assert len(answers) == len(behind) * 2 * len(REQUESTS)
    # 400 is "you speak HTTP to an HTTPS server"; 0 a connection that was cut, with TLS or on a gRPC port.
    assert {answer["status"] for answer in answers} == {0, 400}
    assert {answer["status"] for answer in answers if answer["scheme"] == "https"} == {0}


def test_no_method_of_ray_answers_without_a_token(intruder):
    codes = defaultdict(set)
    for call in intruder["grpc"]:
        codes[call["code"]].add((call["port"], call["method"]))
    served = {method for code in codes for _, method in codes[code] if code == "UNAUTHENTICATED"}
    # Services of every process that has any: GCS, raylet, its object manager, agent, workers, client server.
    for service in ("NodeInfoGcsService", "NodeManagerService", "ObjectManagerService", "CoreWorkerService"):
        assert any(f".{service}/" in method for method in served), service
    # UNAVAILABLE: the port speaks no gRPC at all.
    assert codes.keys() == {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}, codes


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, and files keep nobody but others out")
def test_no_file_and_no_unix_socket_opens_to_another_user(stack, doors, intruder):
    assert any(path.startswith(str(stack.private)) for path in doors["sockets"])
    assert any(path.startswith("/tmp/seaweedfs-") for path in doors["sockets"])
    # FileNotFoundError: one that was there for a moment.
    assert set(intruder["sockets"].values()) <= {"PermissionError", "FileNotFoundError"}, intruder["sockets"]
    assert set(intruder["folders"].values()) == {"PermissionError"}, intruder["folders"]


def test_weed_shell_needs_the_certificate_and_nothing_was_deleted(stack, intruder):
    state = stack.state
    shell = [program("weed"), "shell", f"-master=127.0.0.1:{state.ports['master']}.{state.ports['master_grpc']}"]
    env = {**os.environ, **certificates.environment(stack.home.folder / "s3" / "tls")}
    command = "fs.ls /buckets/figment/kept\n"
    said = subprocess.run(shell, input=command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "door" in said, "with the certificate it lists, and the object is still there"
    assert not any("door" in told for told in intruder["shell"]), intruder["shell"]
    code = (
        "from infra.storage import default_store, open_storage; from pipelines.objects import read_object\n"
        "print(read_object(open_storage(default_store()), 'kept/door')[:15])"
    )
    assert stack.python(code) == "b'behind the door'\n"


def test_what_ray_makes_writable_lies_in_a_folder_of_ours(stack):
    made = stack.private / "r" / "session_latest" / "runtime_resources" / "working_dir_files"
    assert made.is_dir()
    assert stat.S_IMODE(stack.private.stat().st_mode) == 0o700
    assert stat.S_IMODE(stack.home.folder.stat().st_mode) == 0o700
    for path in stack.home.folder.glob("logs/*.log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
