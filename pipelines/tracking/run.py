"""What a training run says about itself, as records for the courier. Knows no server: that is `tracking.py`."""

from __future__ import annotations

import json
import math
import posixpath
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from pipelines.redaction import redact
from pipelines.tracking.outbox import Courier, Record

Status = Literal["FINISHED", "FAILED", "KILLED"]

PARAM_CHARS, TAG_CHARS, KEY_CHARS, DIGEST_CHARS = 6000, 8000, 250, 36  # what MLflow takes
_TEXT = {".json", ".txt", ".md", ".yaml", ".yml", ".csv", ".log"}


class Server(Protocol):
    """What a run must be able to ask of the tracking server's side; answers come from memory, not from the server."""

    session: str  # names this process among those that worked on the run

    @property
    def run_id(self) -> str | None: ...

    @property
    def url(self) -> str | None: ...

    @property
    def model(self) -> str | None: ...

    @property
    def began_s(self) -> float: ...

    def pack(self, module: nn.Module, example: Tensor, files: Mapping[str, bytes]) -> bytes: ...

    def system_sampler(self) -> Callable[[], dict[str, float]]: ...


def flatten(spec: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}, "c": [1, 2]} -> {"a.b": "1", "c": "[1, 2]"}: names and values that MLflow takes, no secrets."""
    flat: dict[str, str] = {}
    for name, value in spec.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, default=str) if isinstance(value, (list, tuple)) else str(value)
            flat[clean_key(f"{prefix}{name}")] = clean_text(text, PARAM_CHARS)
    return flat


def clean_key(name: str) -> str:
    """The nearest name that MLflow takes for a metric, parameter or tag."""
    return posixpath.normpath(re.sub(r"[^\w./: -]", "_", name, flags=re.ASCII)).lstrip("./")[:KEY_CHARS] or "_"


def clean_text(text: str, limit: int = TAG_CHARS) -> str:
    """Without secrets, and no longer than `limit` characters."""
    text = redact(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def clean_file(path: str, data: bytes) -> bytes:
    """A text file without secrets; any other as it is."""
    return redact(data.decode(errors="replace")).encode() if posixpath.splitext(path)[1] in _TEXT else data


def clean_tags(values: Mapping[str, str]) -> dict[str, str]:
    return {clean_key(name): clean_text(str(value)) for name, value in values.items()}


class Run:
    """One training run as the tracking server sees it.

    No method waits for the server (but `settle` and `close`, which say how long) or raises because of it. Without a
    courier nothing is kept.
    """

    def __init__(self, courier: Courier | None, server: Server | None, system_metrics_s: float | None) -> None:
        self._courier, self._server = courier, server
        self._images_seen = 0
        self._nonfinite: set[str] = set()
        self._closing = threading.Event()
        if server is not None and system_metrics_s is not None:
            threading.Thread(
                target=self._watch_system, args=(server, system_metrics_s), name="system-metrics", daemon=True
            ).start()

    @property
    def run_id(self) -> str | None:
        """None until a server has given one."""
        return self._server.run_id if self._server else None

    @property
    def url(self) -> str | None:
        """The run's page; None without a server that has pages."""
        return self._server.url if self._server else None

    @property
    def model(self) -> str | None:
        """`models:/…` of what `publish` published, once it is on the server."""
        return self._server.model if self._server else None

    @property
    def trouble(self) -> str | None:
        """Why records wait to be sent; None while all is well."""
        return self._courier.trouble if self._courier else None

    def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
        """Points at the clock `images_seen`. A value that is not finite becomes a tag: a curve could not show it."""
        self._images_seen = images_seen
        self._points(values, images_seen)
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        fresh = bad.keys() - self._nonfinite
        if fresh:
            self._nonfinite |= fresh
            self.tags({f"nonfinite.{name}": f"{float(bad[name])} at {images_seen} images seen" for name in fresh})

    def artifact(self, data: bytes, path: str) -> None:
        """A file of the run; `path` is relative, with /."""
        self._tell("artifact", clean_file(path, data), path=posixpath.normpath(path).lstrip("./"))

    def tags(self, values: Mapping[str, str]) -> None:
        self._tell("tags", values=clean_tags(values))

    def note(self, text: str) -> None:
        """The run's description, Markdown; the last one stands."""
        self.tags({"mlflow.note.content": text})

    def dataset(self, name: str, version: str, content_hash: str, *, source: str, rows: int) -> None:
        """The data set version that the run trains on: as the run's data set input, and as tags to search by."""
        self.tags({"data.name": name, "data.version": version, "data.content_hash": content_hash})
        self._tell("dataset", name=name, digest=content_hash[:DIGEST_CHARS], source=redact(source), rows=rows)

    def publish(
        self,
        module: nn.Module,
        example: Tensor,
        *,
        files: Mapping[str, bytes],
        registered_name: str | None,
        name: str = "model",
    ) -> None:
        """Publish a module that `mlflow.pyfunc.load_model(…).predict(z)` runs without our code, for any batch size.

        `example` has a batch dimension; `files` (networks.safetensors, spec.json) lie beside the module. With
        `registered_name` it becomes that model's newest version with the alias `challenger`. The export happens here,
        in the caller's thread (seconds, on the CPU: the module is moved there); the sending does not wait. Raises
        `FigmentError` for a module that cannot be exported.
        """
        if self._server is not None:
            packed = self._server.pack(module, example, {path: clean_file(path, data) for path, data in files.items()})
            body = {"name": name, "registered_name": registered_name, "step": self._images_seen}
            self._tell("model", packed, key=uuid.uuid4().hex, **body)

    def settle(self, timeout_s: float = 2.0) -> bool:
        """At a checkpoint: True when all recorded so far survives a `kill -9`, on the server or in the run folder."""
        return self._courier is None or self._courier.settle(timeout_s)

    def close(self, status: Status, timeout_s: float = 60.0) -> int:
        """End the run; number of segments that could not be sent and wait in the outbox (0: all is sent)."""
        if self._courier is None or self._closing.is_set():
            return 0
        self._closing.set()
        self._tell("status", status=status, time_ms=int(1000 * time.time()))
        return self._courier.close(timeout_s)

    def _points(self, values: Mapping[str, float], step: int) -> None:
        finite = {clean_key(name): float(value) for name, value in values.items() if math.isfinite(value)}
        if finite:
            self._tell("points", values=finite, step=step, time_ms=int(1000 * time.time()))

    def _tell(self, kind: str, payload: bytes = b"", **body: Any) -> None:
        if self._courier is not None and self._server is not None:
            self._courier.put(Record(kind, body, self._server.session, payload))

    def _watch_system(self, server: Server, interval_s: float) -> None:
        """Samples of this node; their clock is the seconds since the run began."""
        sample = server.system_sampler()
        while not self._closing.wait(interval_s):
            self._points(sample(), int(time.time() - server.began_s))
