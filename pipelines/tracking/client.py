"""Where the tracking server is, and how its errors read. Importing this sets MLflow up before MLflow is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipelines.errors import FigmentError
from pipelines.redaction import redact

for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The courier tries again by itself; MLflow's own seven retries would hold it for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient, set_tracking_uri  # noqa: E402 - MLflow reads the environment above
from mlflow.exceptions import MlflowException  # noqa: E402

_REFUSED = {400, 404, 409, 413, 422}


@dataclass(frozen=True)
class Tracking:
    """Where runs are tracked. User and password stay in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    uri: str  # http(s)://HOST[:PORT][/PATH] or sqlite:///FILE
    experiment: str = "figment"

    def __post_init__(self) -> None:
        parts = urlsplit(self.uri)
        if parts.username or parts.password:
            raise FigmentError(
                f"the tracking URI {redact(self.uri)} contains a user or password; leave them out and set"
                " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if parts.scheme not in ("http", "https", "sqlite"):
            raise FigmentError(f"the tracking URI {self.uri!r} is neither http(s)://… nor sqlite:///FILE")

    def client(self) -> Any:
        if self.uri.startswith("sqlite"):
            # A registry right on a database looks logged models up at the global URI, whatever its client was given.
            set_tracking_uri(self.uri)
        return MlflowClient(self.uri, registry_uri=self.uri)


def is_refusal(error: Exception) -> bool:
    """True when trying again cannot help: the server (or MLflow's own check) said no to this very record."""
    if isinstance(error, MlflowException):
        return error.error_code != "ENDPOINT_NOT_FOUND" and error.get_http_status_code() in _REFUSED
    answer = getattr(error, "response", None)  # of `requests`: how artifacts are sent
    if answer is not None and hasattr(answer, "status_code"):
        return answer.status_code in _REFUSED
    # Errors of `requests` are OSErrors, an unreadable answer (of some other server on that port) a ValueError too.
    return not isinstance(error, OSError) and isinstance(error, (ValueError, TypeError, KeyError, AttributeError))


def unreachable(tracking: Tracking, error: Exception) -> str:
    return f"MLflow at {tracking.uri} does not take requests ({reason_of(error)})"


def reason_of(error: Exception) -> str:
    """One line, no secrets. MLflow wraps network errors in long sentences; their root is what tells."""
    root: BaseException = error
    while root.__cause__ is not None or root.__context__ is not None:
        root = root.__cause__ or root.__context__ or root
    line = redact(" ".join(str(root).split())) or type(root).__name__
    return line if len(line) <= 300 else line[:299] + "…"
