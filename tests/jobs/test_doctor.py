"""The doctor asks every node, and says of each ill what it is and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infra.processes import free_ports
from jobs.doctor import Doctor, Finding, check_gpu, check_tracking, check_versions, examine, main, versions

ROOT = Path(__file__).resolve().parents[2]


def _examine(options: Doctor) -> dict[str, Finding]:
    said: list[Finding] = []
    findings = examine(options, say=said.append)
    assert said == findings
    return {finding.what: finding for finding in findings}


def test_a_healthy_cluster(ray_cluster, s3_store, mlflow_server):
    url, fs = s3_store
    found = _examine(Doctor(store=url, tracking=mlflow_server))
    assert set(found) == {"CPU", "versions", "storage", "MLflow", "disk", "GPU"}
    assert [str(finding) for finding in found.values() if not finding.ok] == []
    from pyarrow.fs import FileSelector

    assert fs.get_file_info(FileSelector("", allow_not_found=True)) == []  # the probes are gone


def test_each_ill_is_named_with_its_cure(ray_cluster, s3_endpoint):
    (port,) = free_ports(["nobody"]).values()
    ill = Doctor(store="s3://no-such-bucket/x", tracking=f"http://127.0.0.1:{port}", workers=100, min_free_gib=1e6)
    found = _examine(ill)
    assert {what for what, finding in found.items() if not finding.ok} == {"CPU", "storage", "MLflow", "disk"}
    assert "4 CPUs for 100 workers" in found["CPU"].words
    assert "aws s3 mb s3://no-such-bucket" in found["storage"].words
    assert "make stack" in found["MLflow"].words
    assert "TMPDIR" in found["disk"].words


def test_exit_code_and_lines(ray_cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    main(["--store", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "6 checks, all is well"
    assert all(line.startswith("ok   ") for line in lines[:-1])
    with pytest.raises(SystemExit) as end:
        main(["--store", str(tmp_path), "--workers", "9"])
    assert end.value.code == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "6 checks, 1 BAD"
    assert [line.split()[:3] for line in lines if line.startswith("BAD")] == [["BAD", "cluster", "CPU"]]


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--store", "--tracking", "--workers", "--min-free-gib"))


@pytest.mark.servers
def test_every_node_is_asked(tmp_path):
    code = (
        "import sys, ray; from ray.cluster_utils import Cluster\n"
        "from jobs.doctor import Doctor, examine\n"
        "memory = 100 * 2**20\n"
        "from infra.processes import free_ports\n"
        "ports = free_ports(['dashboard', 'agent', 'other'])\n"  # Ray's own are the same for every cluster
        "head = {'num_cpus': 2, 'object_store_memory': memory, 'include_dashboard': False}\n"
        "head |= {'dashboard_port': ports['dashboard'], 'dashboard_agent_listen_port': ports['agent']}\n"
        "cluster = Cluster(initialize_head=True, head_node_args=head)\n"
        "cluster.add_node(num_cpus=2, object_store_memory=memory, dashboard_agent_listen_port=ports['other'])\n"
        "ray.init(address=cluster.address, log_to_driver=False, logging_level='error')\n"
        "for f in examine(Doctor(store=sys.argv[1]), say=lambda f: None): print('FOUND', f.what, f.ok, f.words)\n"
        "ray.shutdown(); cluster.shutdown()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    found = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert found.count(["versions", "True"]) == 2, done.stdout + done.stderr
    assert found.count(["storage", "True"]) == 2


def test_other_versions_are_named():
    here = versions()
    assert check_versions("n", here, here).ok
    assert check_versions("n", {**here, "torch": "2.13.0+cu130"}, {**here, "torch": "2.13.0+cpu"}).ok
    finding = check_versions("n", {**here, "pyarrow": "1.0"}, here)
    assert not finding.ok
    assert f"pyarrow 1.0 (the job has {here['pyarrow']})" in finding.words
    assert "constraints.txt" in finding.words


def test_tracking_that_nodes_cannot_share():
    assert check_tracking("n", "none").ok
    assert not check_tracking("n", "sqlite:///mlflow.db").ok


def test_gpu_findings():
    assert check_gpu("10.0.0.1", 0, None).ok
    assert check_gpu("10.0.0.1", 2, "NVIDIA H200").words == "2 x NVIDIA H200"
    bad = check_gpu("10.0.0.1", 1, "!torch 2.13.0+cpu is built for CPU only: install the CUDA build on this node")
    assert not bad.ok
    assert bad.words.startswith("torch 2.13.0+cpu is built for CPU only")
