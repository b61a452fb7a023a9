"""Submit a command with `ray job submit` and stay with it: `python -m jobs.submit -- python -m jobs.train dcgan-demo`.

Follows the log of the job and nothing but the log, ends with the exit code of the command, and stops the job on Ctrl-C.
A job that runs the same command already is followed, not started twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from infra.servers import program
from jobs.entry import BUG, INTERRUPTED, code_revision, run_job
from pipelines.errors import FigmentError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_FRAME = re.compile(r"^(\S+ \S+\s+INFO job_manager\.py:\d+ -- .*|Running entrypoint for job .*)\n", re.MULTILINE)
"""What the job manager writes above the first line of the job itself."""

_PROGRESS = re.compile(r" ETA [\d:]+\n$")
"""How the lines that only say how far a job is end."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit",
        description=__doc__,
        epilog="The cluster is RAY_API_SERVER_ADDRESS (http://host:port); files that .rayignore names stay at home.",
    )
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="for example: -- python -m jobs.doctor")
    command = parser.parse_args(arguments).command
    client = _client()
    entrypoint = shlex.join(command)
    job = _running(client, entrypoint)
    if job:
        print(f"{job} runs `{entrypoint}` already; following it", flush=True)
    else:
        job = _submit(entrypoint, command)
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        raise SystemExit(follow(client, job))
    except KeyboardInterrupt:
        print(f"\nstopping {job} …", file=sys.stderr, flush=True)
        client.stop_job(job)
        while not client.get_job_status(job).is_terminal():
            time.sleep(0.2)
        print("stopped; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None


def follow(client: JobSubmissionClient, job: str) -> int:
    """Prints the log of `job` while it grows; returns the exit code of its command."""
    try:
        asyncio.run(_print_log(client, job))
        while not client.get_job_status(job).is_terminal():
            time.sleep(0.2)
        info = client.get_job_info(job)
    except (OSError, RuntimeError) as error:
        raise FigmentError(
            f"lost the connection to the cluster while following {job} ({error}); `make status` says whether the local"
            " one runs, and the same command follows the job again"
        ) from error
    if str(info.status) == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None or info.driver_exit_code < 0:  # the command never ran, or was killed
        raise FigmentError(f"the job {job} ended as {info.status}: {info.message}")
    return info.driver_exit_code or BUG


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    terminal, live = sys.stdout.isatty(), False
    async for text in client.tail_job_logs(job):
        shown, live = overlay(_FRAME.sub("", text), live) if terminal else (_FRAME.sub("", text), False)
        print(shown, end="", flush=True)
    if live:
        print()


def overlay(text: str, live: bool) -> tuple[str, bool]:
    """What a terminal shows for more lines of a log: a progress line takes the place of the progress line before it.

    `live` says whether the cursor stands behind a progress line; the second result says so for the next call. The log
    itself cannot say it by carriage returns: the job server makes line ends of them.
    """
    shown = ""
    for line in text.splitlines(keepends=True):
        if _PROGRESS.search(line):
            shown += "\r\033[K" + line.rstrip("\n")
            live = True
        else:
            shown += "\n" * live + line
            live = False
    return shown, live


def _client() -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise FigmentError(
            f"no Ray job server answers at {address} ({reason}); start one with `make stack`, or set"
            " RAY_API_SERVER_ADDRESS"
        ) from error


def _running(client: JobSubmissionClient, entrypoint: str) -> str | None:
    for job in client.list_jobs():
        if job.submission_id and job.entrypoint == entrypoint and not job.status.is_terminal():
            return job.submission_id
    return None


def _submit(entrypoint: str, command: Sequence[str]) -> str:
    name = next((word.removeprefix("jobs.") for word in command if word.startswith("jobs.")), "job")
    job = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    commit = code_revision()  # the cluster may have no repository to ask
    cache = os.environ.get("FIGMENT_CACHE")  # the head has the environment of its own start
    known = {"FIGMENT_REVISION": commit, "FIGMENT_CACHE": cache}
    runtime = json.dumps({"env_vars": {name: value for name, value in known.items() if value}})
    print(f"$ ray job submit --working-dir . -- {entrypoint}", flush=True)
    submit = [program("ray"), "job", "submit", "--no-wait", "--submission-id", job, "--log-color=false"]
    done = subprocess.run(
        [*submit, "--working-dir", ".", "--runtime-env-json", runtime, "--", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FigmentError(f"`ray job submit` failed with exit code {done.returncode}: {_last_line(done.stderr)}")
    return job


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _as_interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
