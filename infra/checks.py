"""How one sees that a part serves: a quick question, and a whole round of its work.

A port that answers is not a server that works. SeaweedFS's S3 port answers for seconds before its volume server has
registered, and every read fails until then; Ray's job server takes no job before its agent is there. So `up` waits for
a round of work (`…_works`), and a part that runs already is asked the quick question (`…_answers`).
"""

from __future__ import annotations

import base64
import json
import time
import urllib.request
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

from pyarrow import fs as pafs

from infra.storage import check_storage

KEPT = ".stack/kept"
"""An object of the bucket that stays from the first start on: whether it can be read tells whether old data can."""
KEPT_BODY = b"Figment's stack reads this after every start, to see that what was written before can be read.\n" * 64

PROBES = ".stack/probes"

PROBE = "figment: is the server up?"
"""The experiment, and its only run, that MLflow is tried with. Deleted except while it is in use: the pages do not show
it. (Only `mlflow gc` removes an experiment for good, and it takes longer than a start.)"""

RAY_JOB, RAY_JOB_S = "stack-check-", 60.0


def s3_answers(s3: pafs.FileSystem, bucket: str) -> bool:
    """Whether the kept object is there and whole; an `OSError` while the bucket or the object cannot be read."""
    if s3.get_file_info(bucket).type != pafs.FileType.Directory:
        raise FileNotFoundError(f"bucket {bucket} is not there yet")
    try:
        with s3.open_input_stream(f"{bucket}/{KEPT}") as stream:
            body = bytes(stream.read())
    except FileNotFoundError:
        return False  # never started before, or its user emptied the bucket: no sign of trouble
    if body != KEPT_BODY:
        raise OSError(f"{bucket}/{KEPT} has other bytes than were written to it")
    return True


def s3_works(s3: pafs.FileSystem, bucket: str) -> None:
    """Reads what was written before this start; writes, reads, lists and deletes something new."""
    if not s3_answers(s3, bucket):
        with s3.open_output_stream(f"{bucket}/{KEPT}") as stream:
            stream.write(KEPT_BODY)
        if not s3_answers(s3, bucket):
            raise OSError(f"{bucket}/{KEPT} was written, but is not there")
    folder = f"{bucket}/{PROBES}"
    s3.create_dir(folder)
    check_storage(pafs.SubTreeFileSystem(folder, s3))
    s3.delete_dir(folder)  # with what an attempt before left that broke off


def mlflow_answers(url: str, header: Mapping[str, str]) -> None:
    ask(f"{url}/api/2.0/mlflow/experiments/search", header, {"max_results": 1})


def mlflow_works(url: str, header: Mapping[str, str]) -> None:
    """Logs to a run, uploads an artifact and fetches it again, all through the server. Leaves nothing that one sees."""
    api = f"{url}/api/2.0/mlflow"
    try:
        found = ask(f"{api}/experiments/get-by-name?experiment_name={quote(PROBE)}", header)["experiment"]
        experiment = found["experiment_id"]
        if found["lifecycle_stage"] == "deleted":
            ask(f"{api}/experiments/restore", header, {"experiment_id": experiment})
    except HTTPError as error:
        if error.code != 404:
            raise
        experiment = ask(f"{api}/experiments/create", header, {"name": PROBE})["experiment_id"]
    try:
        search = {"experiment_ids": [experiment], "run_view_type": "ALL", "max_results": 1}
        runs = ask(f"{api}/runs/search", header, search).get("runs", [])
        info = (runs[0] if runs else ask(f"{api}/runs/create", header, {"experiment_id": experiment})["run"])["info"]
        run = info["run_id"]
        if info["lifecycle_stage"] == "deleted":
            ask(f"{api}/runs/restore", header, {"run_id": run})
        now = int(time.time())
        ask(f"{api}/runs/log-metric", header, {"run_id": run, "key": "seen", "value": now, "timestamp": now * 1000})
        artifact = f"{url}/api/2.0/mlflow-artifacts/artifacts/{experiment}/{run}/artifacts/{uuid.uuid4().hex}"
        body = uuid.uuid4().bytes
        fetch(artifact, header, body, method="PUT")
        if fetch(artifact, header) != body:
            raise OSError("MLflow gave back another artifact than was uploaded")
        fetch(artifact, header, method="DELETE")
    finally:
        ask(f"{api}/experiments/delete", header, {"experiment_id": experiment})  # and with it its run


def ray_answers(url: str, header: Mapping[str, str]) -> None:
    ask(f"{url}/api/jobs/", header)


def ray_works(url: str, header: Mapping[str, str]) -> None:
    """A job that does nothing is taken, done, and forgotten."""
    names = _ray_checks(url, header)
    if not names:
        name = f"{RAY_JOB}{uuid.uuid4().hex[:8]}"
        # A patient question: one that is given up may yet become a job, which nobody would forget.
        ask(f"{url}/api/jobs/", header, {"entrypoint": "true", "submission_id": name}, timeout_s=RAY_JOB_S)
        names = [name]
    until = time.monotonic() + RAY_JOB_S
    while names:
        for name in names:
            while (told := ask(f"{url}/api/jobs/{name}", header))["status"] in ("PENDING", "RUNNING"):
                if time.monotonic() > until:
                    raise TimeoutError(f"the job {name} (`true`) has not ended after {RAY_JOB_S:.0f} s")
                time.sleep(0.1)
            fetch(f"{url}/api/jobs/{name}", header, method="DELETE")
            if told["status"] != "SUCCEEDED":
                raise OSError(f"the job {name} (`true`) ended as {told['status']}: {told['message']}")
        names = _ray_checks(url, header)  # of an attempt before this one, which broke off


def _ray_checks(url: str, header: Mapping[str, str]) -> list[str]:
    names = [job["submission_id"] or "" for job in ask(f"{url}/api/jobs/", header)]
    return [name for name in names if name.startswith(RAY_JOB)]


# --- HTTP without libraries -----------------------------------------------------------------------------------------


def ask(url: str, header: Mapping[str, str], body: object = None, timeout_s: float = 10.0) -> Any:
    """The JSON answer of a server; an `OSError` (urllib's) when it refuses or is not there."""
    data = None if body is None else json.dumps(body).encode()
    return json.loads(fetch(url, {"Content-Type": "application/json", **header}, data, timeout_s=timeout_s))


def fetch(
    url: str,
    header: Mapping[str, str],
    data: bytes | None = None,
    method: str | None = None,
    timeout_s: float = 10.0,
) -> bytes:
    """The bytes that a server answers with. No proxy stands between."""
    request = urllib.request.Request(url, data=data, headers=dict(header), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as answer:
        return answer.read()


def basic_auth(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
