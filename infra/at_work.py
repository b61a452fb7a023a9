"""What a Ray head is doing, so that nobody ends it unasked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from infra.checks import ask

IDLE = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_")
"""How the titles of Ray's processes begin that work for nobody: spare workers (also `ray::IDLE_SpillWorker`), Ray's own
agents, and the actors that Ray Data leaves behind (`ray::_StatsActor`)."""


def jobs_at_work(url: str, header: Mapping[str, str], session: Sequence[psutil.Process]) -> list[str]:
    """The command of every job that the head at `url` runs, submitted or started beside it; [] when there is none.

    A head that hangs is asked in vain. Then its processes tell: Ray titles each worker with the actor or the task that
    it does, a submitted job is the child of an actor `JobSupervisor`, and spare workers are idle. A driver that was
    started beside the head and has neither actor nor task at this moment is not seen; it loses nothing in the head.
    """
    if not session:
        return []
    try:
        return [_named(job) for job in ask(f"{url}/api/jobs/", header) if job["status"] in ("PENDING", "RUNNING")]
    except (OSError, ValueError):
        return _workers(session)


def _named(job: Mapping[str, Any]) -> str:
    command, name = job["entrypoint"], job.get("submission_id")
    return f"{name} (`{command}`)" if name else f"`{command}`"


def _workers(session: Sequence[psutil.Process]) -> list[str]:
    titles, commands = [], []
    for process in session:
        try:
            # Not the name: the kernel cuts that to 15 characters.
            title = " ".join(process.cmdline()).strip()
            if not title.startswith("ray::") or title.startswith(IDLE):
                continue
            if not title.startswith("ray::JobSupervisor"):
                titles.append(f"{title} (pid {process.pid})")
                continue
            entrypoints = [child.cmdline() for child in process.children()]
            said = [words[-1] for words in entrypoints if words[1:2] == ["-c"]]  # /bin/sh -c COMMAND
            commands += [f"`{said[0]}`" if said else f"{title} (pid {process.pid})"]
        except psutil.NoSuchProcess:
            continue
    return commands or titles
