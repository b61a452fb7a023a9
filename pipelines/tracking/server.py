"""The MLflow side of one run: finds or makes it, and sends its records."""

from __future__ import annotations

import io
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs as pafs
from torch import Tensor, nn

from pipelines.tracking.client import MlflowException, Tracking, is_refusal, reason_of, unreachable
from pipelines.tracking.outbox import Courier, Identity, Outbox, Record, Unreachable
from pipelines.tracking.published import pack_model, publish_model
from pipelines.tracking.run import Run, Status, clean_file, clean_tags, flatten

# isort: split
from mlflow import entities as mlf
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

_log = logging.getLogger(__name__)

_RUN_KEY = "figment.run_key"
_KIND = "mlflow.experimentKind"  # else the pages show an experiment as one with language models
_METRICS_PER_REQUEST, _PAIRS_PER_REQUEST = 1000, 100  # MLflow's limits
_T = TypeVar("_T")


def open_run(
    tracking: Tracking | None,
    *,
    name: str,
    outbox: tuple[pafs.FileSystem, str],
    run_id: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    system_metrics_s: float | None = 10.0,
    wait_s: float = 10.0,
) -> Run:
    """Begin a run, or go on with it: with `run_id`, else with the run that `outbox` (fs, folder) remembers.

    Waits at most `wait_s` seconds for the server's first answer and never fails for want of one. `params` may nest.
    `system_metrics_s` is the interval of the CPU, memory, disk, network and GPU samples; None takes none. Without
    `tracking` the run keeps nothing.
    """
    if tracking is None:
        return Run(None, None, None)
    box = Outbox(*outbox)
    labels = clean_tags(tags or {})
    identity = box.identity() or Identity(name=name, tags=labels)
    if run_id is not None:
        identity = replace(identity, run_id=run_id)
    box.remember(identity)
    server = _MlflowServer(tracking, box, identity, resume=True)
    courier = Courier(box, server.connect, server.deliver)
    courier.put(Record("params", {"values": flatten(params or {})}, server.session))
    courier.put(Record("tags", {"values": labels}, server.session))
    courier.attempted.wait(wait_s)
    return Run(courier, server, system_metrics_s)


def send_outbox(tracking: Tracking, outbox: tuple[pafs.FileSystem, str], timeout_s: float = 60.0) -> int:
    """Send what earlier processes of a run could not; number of segments that still wait (0: all is sent)."""
    box = Outbox(*outbox)
    identity = box.identity()
    if identity is None or not box.segments():
        return 0
    server = _MlflowServer(tracking, box, identity, resume=False)
    return Courier(box, server.connect, server.deliver).close(timeout_s)


def add_to_run(
    tracking: Tracking,
    outbox: tuple[pafs.FileSystem, str],
    *,
    tags: Mapping[str, str],
    artifacts: Mapping[str, bytes],
    timeout_s: float = 60.0,
) -> int:
    """Tags and files for a run that is at work, or has ended: its status and its end stay what they are. Number of
    segments that wait in the outbox; nothing is done for a run that was never tracked."""
    box = Outbox(*outbox)
    identity = box.identity()
    if identity is None:
        return 0
    server = _MlflowServer(tracking, box, identity, resume=False)
    courier = Courier(box, server.connect, server.deliver)
    courier.put(Record("tags", {"values": clean_tags(tags)}, server.session))
    for path, data in artifacts.items():
        courier.put(Record("artifact", {"path": path}, server.session, clean_file(path, data)))
    return courier.close(timeout_s)


def end_run(
    tracking: Tracking, outbox: tuple[pafs.FileSystem, str], status: Status, note: str, timeout_s: float = 60.0
) -> int:
    """Tell the end of a run whose own process could not tell it; number of segments that wait in the outbox."""
    box = Outbox(*outbox)
    identity = box.identity()
    if identity is None:  # it ended before it was known to anybody
        return 0
    server = _MlflowServer(tracking, box, identity, resume=False)
    courier = Courier(box, server.connect, server.deliver)
    courier.put(Record("tags", {"values": clean_tags({"mlflow.note.content": note})}, server.session))
    courier.put(Record("status", {"status": status, "time_ms": int(1000 * time.time())}, server.session))
    return courier.close(timeout_s)


class _MlflowServer:
    """The MLflow side of one run; `connect` and `deliver` are the courier's."""

    def __init__(self, tracking: Tracking, box: Outbox, identity: Identity, *, resume: bool) -> None:
        self.session = uuid.uuid4().hex
        self.model: str | None = None
        self._tracking, self._box, self._identity, self._resume = tracking, box, identity, resume
        self._client = tracking.client()
        self._experiment = ""
        self._floor: dict[str, int] = {}  # metric -> the last step that the run has already, see `_new_points`
        self._reached: dict[str, int] = {}
        self._speaker = ""

    @property
    def run_id(self) -> str | None:
        return self._identity.run_id if self._experiment else None

    @property
    def began_s(self) -> float:
        return self._identity.created_s

    @property
    def url(self) -> str | None:
        if self.run_id is None or not self._tracking.uri.startswith("http"):
            return None
        return f"{self._tracking.uri.rstrip('/')}/#/experiments/{self._experiment}/runs/{self.run_id}"

    def connect(self) -> None:
        """Find the run or make it; `Unreachable` when that is not possible now."""
        try:
            experiment = _experiment(self._client, self._tracking)
            run = self._find(experiment)
            if run is None:
                labels = {**self._identity.tags, _RUN_KEY: self._identity.key}
                began_ms = int(1000 * self.began_s)
                run = self._client.create_run(experiment, began_ms, labels, self._identity.name)
            elif self._resume:
                self._client.update_run(run.info.run_id, status="RUNNING")
            # Public methods give a metric's last value without its step, or its whole history.
            self._floor = {metric.key: metric.step for metric in run.data._metric_objs}
            self._identity = replace(self._identity, run_id=run.info.run_id)
            self._box.remember(self._identity)
            self._experiment = run.info.experiment_id
        except Exception as error:
            raise Unreachable(unreachable(self._tracking, error)) from error

    def _find(self, experiment: str) -> Any:
        if self._identity.run_id is not None:
            try:
                run = self._client.get_run(self._identity.run_id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if not is_refusal(error):
                    raise
            _log.warning("tracking: there is no run %s at %s (any more)", self._identity.run_id, self._tracking.uri)
        found = self._client.search_runs([experiment], f"tags.`{_RUN_KEY}` = '{self._identity.key}'", max_results=1)
        return found[0] if found else None

    def deliver(self, records: Sequence[Record]) -> list[Record]:
        """Send records in order; returns those that the server, though it answers, did not take."""
        handlers: dict[str, Callable[[Record], None]] = {
            "params": self._params,
            "tags": lambda record: self._tags(record.body["values"]),
            "artifact": self._artifact,
            "dataset": self._dataset,
            "model": self._model,
            "status": self._status,
        }
        late: list[Record] = []
        for kind, group in groupby(records, key=lambda record: record.kind):
            if kind == "points":
                for metrics in _batched(
                    (m for record in group for m in self._new_points(record)), _METRICS_PER_REQUEST
                ):
                    self._attempt("points", partial(self._client.log_batch, self.run_id, metrics=metrics))
            else:
                for record in group:
                    try:
                        self._attempt(kind, partial(handlers[kind], record))
                    except Unreachable as error:
                        if not self._answers():
                            raise
                        _log.warning("tracking: %s: %s is tried again later", error, kind)
                        late.append(record)
        return late

    def _attempt(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if not is_refusal(error):
                raise Unreachable(unreachable(self._tracking, error)) from error
            _log.warning("tracking: MLflow refused %s of run %s: %s", what, self.run_id, reason_of(error))

    def _answers(self) -> bool:
        try:
            self._client.get_run(self.run_id)
        except (MlflowException, OSError):
            return False
        return True

    def _new_points(self, record: Record) -> Iterator[Any]:
        """A record's points, without those at steps that an earlier process (on the server or in the outbox) made.

        Records come in the order in which they were made, so an earlier process's points are all there up to its
        last one, and a process never has to look at more than that last step.
        """
        if record.session != self._speaker:
            self._floor |= {key: max(step, self._floor.get(key, step)) for key, step in self._reached.items()}
            self._reached, self._speaker = {}, record.session
        step, time_ms = record.body["step"], record.body["time_ms"]
        for key, value in record.body["values"].items():
            if step > self._floor.get(key, -1):
                self._reached[key] = step
                yield mlf.Metric(key, value, time_ms, step)

    def _params(self, record: Record) -> None:
        """Parameters cannot change in MLflow; a resumed run with other ones says so in a tag."""
        have = self._client.get_run(self.run_id).data.params
        fresh = [mlf.Param(k, v) for k, v in record.body["values"].items() if k not in have]
        for params in _batched(fresh, _PAIRS_PER_REQUEST):
            self._client.log_batch(self.run_id, params=params)
        changed = {k: v for k, v in record.body["values"].items() if have.get(k, v) != v}
        self._tags({f"resumed_with.{k}"[:250]: v for k, v in changed.items()})

    def _tags(self, values: Mapping[str, str]) -> None:
        for tags in _batched((mlf.RunTag(k, v) for k, v in values.items()), _PAIRS_PER_REQUEST):
            self._client.log_batch(self.run_id, tags=tags)

    def _artifact(self, record: Record) -> None:
        self._client.log_stream(self.run_id, io.BytesIO(record.payload), record.body["path"])

    def _dataset(self, record: Record) -> None:
        body = record.body
        profile = json.dumps({"rows": body["rows"]})
        data = mlf.Dataset(body["name"], body["digest"], "figment", json.dumps({"uri": body["source"]}), None, profile)
        context = [mlf.InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self.run_id, [mlf.DatasetInput(data, context)])

    def _status(self, record: Record) -> None:
        if record.session == self.session or not self._resume:  # an earlier process's end is over: the run goes on
            self._client.set_terminated(self.run_id, record.body["status"], record.body["time_ms"])

    def _model(self, record: Record) -> None:
        body = record.body
        self.model = publish_model(
            self._client,
            record.payload,
            experiment=self._experiment,
            run_id=str(self.run_id),
            name=body["name"],
            key=body["key"],
            step=body["step"],
            registered_name=body["registered_name"],
        )
        self._tags({"figment.model": self.model})

    def pack(self, module: nn.Module, example: Tensor, files: Mapping[str, bytes]) -> bytes:
        return pack_model(module, example, files)

    def system_sampler(self) -> Callable[[], dict[str, float]]:
        """A function that samples this node; MLflow's own loop would end for good at the first failed request."""
        monitors = SystemMetricsMonitor(self.session, tracking_uri=self._tracking.uri).monitors

        def sample() -> dict[str, float]:
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.clear_metrics()
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
            return {f"system/{name}": float(value) for name, value in values.items()}

        sample()  # the first CPU reading has no interval that it could be a share of
        return sample


def _experiment(client: Any, tracking: Tracking) -> str:
    """The experiment's id; it is made when there is none."""
    found = client.get_experiment_by_name(tracking.experiment)
    if found is None:
        beside = None
        if tracking.uri.startswith("sqlite:///"):  # else artifacts would land wherever the process happens to run
            beside = Path(tracking.uri.removeprefix("sqlite:///")).absolute().with_suffix("").as_uri() + "-artifacts"
        try:
            return client.create_experiment(tracking.experiment, beside, {_KIND: "custom_model_development"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run made it at the same moment
                raise
            found = client.get_experiment_by_name(tracking.experiment)
    return found.experiment_id


def _batched(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
