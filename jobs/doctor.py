"""Check a cluster before it is trusted with work: `python -m jobs.doctor`, also through `ray job submit`.

Every node is asked itself, by a task pinned to it: versions, object storage, MLflow, GPU, disk. One line a check, `ok`
or `BAD` with what to do; exit code 0 when all is well, else 2.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import tyro
from pyarrow import fs as pafs

from infra.checks import ask, basic_auth
from infra.storage import StorageError, check_storage, default_store, explain, open_storage, redact
from jobs.entry import USER_ERROR, connect_ray, run_job

PACKAGES = ("ray", "torch", "pyarrow", "mlflow", "numpy")
NODE_PATIENCE_S = 180.0


@dataclass(frozen=True)
class Doctor:
    """What to check. By default all of it, as the environment describes it."""

    store: str | None = None
    """Storage url (s3://bucket/prefix, file:///folder); by default FIGMENT_STORE."""
    tracking: str | None = None
    """MLflow tracking URI, or "none"; by default MLFLOW_TRACKING_URI. User and password come from the environment."""
    workers: int = 2
    """Training workers that a job will ask for; the tasks that read data need a CPU beside them."""
    min_free_gib: float = 5.0
    """Free disk space that every node must have for temporary files, in GiB."""


@dataclass(frozen=True)
class Finding:
    where: str  # a node's address, or "cluster"
    what: str
    ok: bool
    words: str

    def __str__(self) -> str:
        return f"{'ok ' if self.ok else 'BAD'}  {self.where:<15} {self.what:<9} {redact(' '.join(self.words.split()))}"


def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Doctor, prog="python -m jobs.doctor", description=__doc__, args=arguments)
    connect_ray()
    findings = examine(options, say=lambda finding: print(finding, flush=True))
    bad = sum(not finding.ok for finding in findings)
    print(f"{len(findings)} checks, {bad} BAD" if bad else f"{len(findings)} checks, all is well", flush=True)
    if bad:
        raise SystemExit(USER_ERROR)


def examine(options: Doctor, say: Callable[[Finding], None]) -> list[Finding]:
    """All findings of the connected Ray cluster; each is also said as soon as it is known."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    findings: list[Finding] = []

    def found(finding: Finding) -> None:
        findings.append(finding)
        say(finding)

    url = options.store or default_store()
    fs, probe = None, f".seen-by-all-{uuid.uuid4().hex}"
    try:
        if url is None:
            raise StorageError("no storage is named: set FIGMENT_STORE or --store, e.g. to s3://bucket/prefix")
        fs = open_storage(url, patience_s=0)  # what is wrong now is what is asked
        with fs.open_output_stream(probe) as stream:
            stream.write(b"figment")
    except (StorageError, OSError) as error:
        fs = None
        found(
            Finding(
                "cluster",
                "storage",
                False,
                str(error) if isinstance(error, StorageError) else explain(error, url or ""),
            )
        )

    tracking = options.tracking or os.environ.get("MLFLOW_TRACKING_URI", "none")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    found(check_cpus(ray.cluster_resources().get("CPU", 0.0), options.workers))
    asked = []
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        look = ray.remote(num_cpus=0, scheduling_strategy=place)(examine_node)
        answer = look.remote(node["NodeManagerAddress"], fs, url, probe, tracking, options.min_free_gib, versions())
        touch = ray.remote(num_cpus=0, num_gpus=0.01, scheduling_strategy=place)(use_gpu)
        gpus = node["Resources"].get("GPU", 0)
        asked.append((node["NodeManagerAddress"], answer, touch.remote() if gpus else None, int(gpus)))
    for where, answer, touched, gpus in asked:
        try:
            for finding in ray.get(answer, timeout=NODE_PATIENCE_S):
                found(finding)
            name = ray.get(touched, timeout=NODE_PATIENCE_S) if touched is not None else None
            found(check_gpu(where, gpus, name))
        except (ray.exceptions.RayError, TimeoutError) as error:
            words = f"the node does not do its tasks ({_first_line(error)}): look at its log, restart Ray on it"
            found(Finding(where, "node", False, words))
    if fs is not None:
        fs.delete_file(probe)
    return findings


def examine_node(
    where: str,
    fs: pafs.FileSystem | None,
    url: str | None,
    probe: str,
    tracking: str,
    min_free_gib: float,
    wanted: dict[str, str],
) -> list[Finding]:
    """Runs on the node itself."""
    findings = [check_versions(where, versions(), wanted)]
    if fs is not None and url is not None:
        findings.append(check_node_storage(where, fs, url, probe))
    findings.append(check_tracking(where, tracking))
    findings.append(check_disk(where, tempfile.gettempdir(), min_free_gib))
    return findings


def versions() -> dict[str, str]:
    """Of Python and of what a job and its workers must have alike; "missing" where it is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def check_versions(where: str, here: dict[str, str], wanted: dict[str, str]) -> Finding:
    def public(name: str, of: dict[str, str]) -> str:
        return of[name].partition("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are the same torch

    other = [name for name in wanted if public(name, here) != public(name, wanted)]
    if other:
        told = ", ".join(f"{name} {here[name]} (the job has {wanted[name]})" for name in other)
        return Finding(where, "versions", False, f"{told}: install the same constraints.txt on every node")
    return Finding(where, "versions", True, " ".join(f"{name} {here[name]}" for name in wanted))


def check_node_storage(where: str, fs: pafs.FileSystem, url: str, probe: str) -> Finding:
    try:
        if fs.get_file_info(probe).type == pafs.FileType.NotFound:
            words = f"does not see what the job wrote to {url}: use object storage, or a folder that all nodes share"
            return Finding(where, "storage", False, words)
        check_storage(fs)
    except StorageError as error:
        return Finding(where, "storage", False, f"{url}: {error}")
    except OSError as error:
        return Finding(where, "storage", False, explain(error, url))
    return Finding(where, "storage", True, f"{url}: write, read, list, delete")


def check_tracking(where: str, uri: str) -> Finding:
    """Asks an MLflow server for one experiment, with the login of the environment."""
    if uri == "none":
        return Finding(where, "MLflow", True, "none is named (MLFLOW_TRACKING_URI): runs are not tracked")
    if urlsplit(uri).scheme not in ("http", "https"):
        words = f"{uri} is not a server, so only one machine can use it: set MLFLOW_TRACKING_URI to http(s)://host:port"
        return Finding(where, "MLflow", False, words)
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    header = {"Authorization": f"Bearer {token}"} if token else {}
    if user and password:
        header = basic_auth(user, password)
    try:
        ask(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search", header, {"max_results": 1})
    except HTTPError as error:
        cure = {
            401: "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on this node",
            403: "let its --allowed-hosts have this name, or give this user the permission",
        }.get(error.code, "is this the address of an MLflow server? look at its log")
        return Finding(where, "MLflow", False, f"{uri} answers {error.code} {error.reason}: {cure}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        words = f"cannot reach {uri} ({reason}): check MLFLOW_TRACKING_URI, start the server (`make stack`)"
        return Finding(where, "MLflow", False, words)
    return Finding(where, "MLflow", True, f"{uri} answers{'' if header else ', without a login'}")


def check_disk(where: str, folder: str, min_free_gib: float) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    if free < min_free_gib:
        words = f"{free:.1f} GiB free in {folder}, {min_free_gib:g} wanted: free some space or set TMPDIR"
        return Finding(where, "disk", False, words)
    return Finding(where, "disk", True, f"{free:.1f} GiB free in {folder}")


def check_cpus(there: float, workers: int) -> Finding:
    if there < workers + 1:
        words = f"{there:g} CPUs for {workers} workers and the tasks that read data: add nodes, or use fewer workers"
        return Finding("cluster", "CPU", False, words)
    return Finding("cluster", "CPU", True, f"{there:g} CPUs declared, enough for {workers} workers and their data")


def check_gpu(where: str, gpus: int, used: str | None) -> Finding:
    """`used` is what `use_gpu` said; None when the node declares no GPU."""
    if gpus == 0:
        if shutil.which("nvidia-smi") and where == "127.0.0.1":
            words = "this machine has an NVIDIA driver, but Ray declares no GPU: start its node with --num-gpus"
            return Finding(where, "GPU", False, words)
        return Finding(where, "GPU", True, "none declared: training runs on CPU")
    ok = used is not None and not used.startswith("!")
    return Finding(where, "GPU", ok, f"{gpus} x {used}" if ok else (used or "").lstrip("!"))


def use_gpu() -> str:
    """Runs on a node with a GPU: its name after a real computation on it, or "!" and what is wrong."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"!torch {torch.__version__} is built for CPU only: install the CUDA build on this node"
    try:
        if torch.ones(64, device="cuda").sum().item() != 64:
            return "!the GPU miscounts: take this node out of the cluster"
        return torch.cuda.get_device_name()
    except RuntimeError as error:
        return f"!{_first_line(error)}: check nvidia-smi on this node"


def _first_line(error: Any) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
