"""`ray_cluster.yaml` is what `ray up` takes, and holds no secret."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml

from pipelines.ray_private import prepared_cluster_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_ray_accepts_it(cluster):
    prepared = prepared_cluster_file(copy.deepcopy(cluster))
    assert prepared["head_node_type"] in prepared["available_node_types"]
    assert prepared["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_ray_would_refuse_a_typo(cluster):
    import jsonschema

    cluster["setup_comands"] = []
    with pytest.raises(jsonschema.ValidationError):
        prepared_cluster_file(cluster)


def test_nodes_get_the_pinned_versions_and_the_environment_of_a_private_file(cluster):
    assert any("--constraint ~/figment/constraints.txt" in command for command in cluster["setup_commands"])
    for role in ("head", "worker"):
        start = cluster[f"{role}_start_ray_commands"][-1]
        assert ". ~/.config/figment/cluster.env" in start
        assert "RAY_AUTH_MODE=token" in start
        assert "--disable-usage-stats" in start
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_it_holds_no_secret():
    text = (ROOT / "ray_cluster.yaml").read_text()
    named = re.findall(r"(?:SECRET\w*|PASSWORD|TOKEN|KEY_ID)=(\S+)", text)
    assert named
    assert set(named) == {"…"}
