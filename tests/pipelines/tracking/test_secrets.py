"""What must not appear, and names and values as MLflow takes them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from pipelines.errors import FigmentError
from pipelines.redaction import redact
from pipelines.tracking import Tracking, fetch_published, open_run
from pipelines.tracking.client import MlflowException
from pipelines.tracking.run import clean_key, flatten

# isort: split
import mlflow
from asking import PATIENCE_S, Generator


def test_secrets_never_appear(
    tracking: Tracking,
    outbox: tuple[pafs.FileSystem, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secrets = {"MLFLOW_TRACKING_PASSWORD": "hunter2-mlflow", "RAY_AUTH_TOKEN": "ray-token-123"}
    for variable, value in secrets.items():
        monkeypatch.setenv(variable, value)
    everything = f"{os.environ['AWS_SECRET_ACCESS_KEY']} {' '.join(secrets.values())} s3://me:word-of-pass@host/b"
    name = uuid.uuid4().hex
    run = open_run(
        tracking,
        name="s",
        outbox=outbox,
        params={"a": {"b": everything}},
        tags={"t": everything},
        system_metrics_s=None,
    )
    run.note(everything)
    run.artifact(everything.encode(), "spec.json")
    run.dataset("d", "v", "h", source=everything, rows=1)
    run.publish(Generator().eval(), torch.zeros(2, 5), files={"spec.json": everything.encode()}, registered_name=name)
    assert run.close("FINISHED", PATIENCE_S) == 0

    client = tracking.client()
    stored = client.get_run(run.run_id)
    told = [*stored.data.params.values(), *stored.data.tags.values(), str(stored.inputs.dataset_inputs), caplog.text]
    told.append(Path(client.download_artifacts(run.run_id, "spec.json", str(tmp_path))).read_text())
    told.append(fetch_published(tracking, f"models:/{name}/1")["spec.json"].decode())
    for text in told:
        for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], *secrets.values(), "word-of-pass"):
            assert secret not in text
    assert "[redacted]" in stored.data.params["a.b"]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://user:pw@host:5432/db", "postgresql://[redacted]@host:5432/db"),
        ("http://host/a?b=c@d", "http://host/a?b=c@d"),
        ("mail to me@example.org", "mail to me@example.org"),
        ("https://s3/x?X-Amz-Signature=abc&y=1", "https://s3/x?X-Amz-Signature=[redacted]&y=1"),
    ],
)
def test_redact_urls(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_a_tracking_uri_carries_no_password() -> None:
    with pytest.raises(FigmentError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        Tracking("http://me:very-secret@127.0.0.1:5000")
    assert "very-secret" not in str(caught.value)
    with pytest.raises(FigmentError, match="neither"):
        Tracking("file:///tmp/mlruns")


def test_flatten() -> None:
    spec = {"a": {"b": 1, "c": {"d": None}}, "e": (1, 2), "f(x)": True}
    assert flatten(spec) == {"a.b": "1", "a.c.d": "None", "e": "[1, 2]", "f_x_": "True"}


@given(st.text(min_size=1))
def test_mlflow_takes_every_clean_key(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_tag

    key = clean_key(name)
    _validate_metric_name(key)
    _validate_tag(key, "v")


def test_the_installed_mlflow_is_the_one_that_was_read() -> None:
    """`RunData._metric_objs` is not public: the only way to a metric's last step without its whole history."""
    assert mlflow.__version__.startswith("3.17.")
    assert MlflowException is mlflow.exceptions.MlflowException
