"""Models that are published to a real MLflow server, and come back."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import PATIENCE_S, Generator
from pyarrow import fs as pafs
from torch import nn

from infra.storage import open_storage
from pipelines.errors import FigmentError
from pipelines.tracking import CHALLENGER, Tracking, fetch_published, open_run


@pytest.fixture
def published(tracking: Tracking, outbox: tuple[pafs.FileSystem, str]) -> tuple[Tracking, str, str, nn.Module]:
    """(tracking, registered name, run id, module)."""
    name = f"figment-{uuid.uuid4().hex[:8]}"
    module = Generator().eval()
    run = open_run(tracking, name="publishes", outbox=outbox, system_metrics_s=None)
    run.metrics({"loss": 1.0}, 640)
    files = {"networks.safetensors": b"\x01\x02", "spec.json": b'{"a": 1}'}
    run.publish(module, torch.zeros(1, 5), files=files, registered_name=name)
    assert run.close("FINISHED", PATIENCE_S) == 0
    assert run.model == f"models:/{name}/1" and run.run_id is not None
    return tracking, name, run.run_id, module


def test_a_published_model_needs_none_of_our_code(
    published: tuple[Tracking, str, str, nn.Module], tmp_path: Path
) -> None:
    tracking, name, _, module = published
    latents = [np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32) for n in (1, 2, 7)]
    np.savez(tmp_path / "z.npz", *latents)
    program = f"""
import sys, numpy as np, mlflow
mlflow.set_tracking_uri({tracking.uri!r})
model = mlflow.pyfunc.load_model("models:/{name}@{CHALLENGER}")
z = np.load("z.npz")
np.savez("x.npz", *[model.predict(z[k]) for k in z.files])
assert not [m for m in sys.modules if m.split(".")[0] in ("pipelines", "models")]
"""
    subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, check=True, timeout=PATIENCE_S)
    images = np.load(tmp_path / "x.npz")
    for z, key in zip(latents, images.files, strict=True):
        with torch.no_grad():
            expected = module(torch.from_numpy(z)).numpy()
        np.testing.assert_allclose(images[key], expected, atol=1e-6)


def test_files_of_a_published_model_come_back(published: tuple[Tracking, str, str, nn.Module]) -> None:
    tracking, name, run_id, _ = published
    files = {"networks.safetensors": b"\x01\x02", "spec.json": b'{"a": 1}'}
    for model in (f"models:/{name}@{CHALLENGER}", f"models:/{name}/1", run_id):
        assert fetch_published(tracking, model) == files
    (output,) = tracking.client().get_run(run_id).outputs.model_outputs
    assert output.step == 640


def test_the_newest_version_is_the_challenger(published: tuple[Tracking, str, str, nn.Module], tmp_path: Path) -> None:
    tracking, name, _, module = published
    run = open_run(tracking, name="b", outbox=(open_storage(str(tmp_path / "b")), "o"), system_metrics_s=None)
    run.publish(module, torch.zeros(2, 5), files={"spec.json": b"second"}, registered_name=name)
    assert run.close("FINISHED", PATIENCE_S) == 0
    assert run.model == f"models:/{name}/2"
    assert fetch_published(tracking, f"models:/{name}@{CHALLENGER}") == {"spec.json": b"second"}


def test_what_is_not_published_is_said(
    published: tuple[Tracking, str, str, nn.Module], outbox: tuple[pafs.FileSystem, str]
) -> None:
    tracking, name, _, _ = published
    empty = tracking.client().create_run(tracking.client().create_experiment(uuid.uuid4().hex), run_name="empty")
    for model, sentence in {
        "nonsense": "names no model",
        "models:/nobody/1": rf"no registered model 'nobody' \(found: .*{name}",
        f"models:/{name}@champion": rf"no alias 'champion' \(found: {CHALLENGER}\)",
        f"models:/{name}/7": r"no version 7 \(found: 1\)",
        "0" * 32: "there is no run 0000",
        empty.info.run_id: r"\(empty\) has published no model",
    }.items():
        with pytest.raises(FigmentError, match=sentence):
            fetch_published(tracking, model)


def test_a_module_that_fixes_the_batch_is_not_published(
    tracking: Tracking, outbox: tuple[pafs.FileSystem, str]
) -> None:
    class Fixed(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z.reshape(2, 5)

    run = open_run(tracking, name="fixed", outbox=outbox, system_metrics_s=None)
    with pytest.raises(FigmentError, match="Fixed cannot be exported for any batch size"):
        run.publish(Fixed(), torch.zeros(2, 5), files={}, registered_name=None)
    assert run.close("FAILED", PATIENCE_S) == 0
