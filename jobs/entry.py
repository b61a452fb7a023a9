"""What every job does at its edges: errors become one sentence and an exit code, and Ray is found and kept quiet.

Exit codes: 0 done, 1 a bug (with its traceback), 2 something the user can mend (one `error: …` line), 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from infra.storage import StorageError, default_store, explain, redact
from pipelines.errors import FigmentError

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130

CODE = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "pipelines", "jobs", "infra")


def run_job(main: Callable[[], None]) -> None:
    """Calls `main` and ends the process with the exit code of what happened. Returns when all is well."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from where it stopped", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001 - the outermost frame of a job decides for every kind of error
        sentence = user_sentence(error)
        if sentence is None:
            traceback.print_exception(error)
            raise SystemExit(BUG) from None
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR) from None


def user_sentence(error: BaseException) -> str | None:
    """The sentence for an error that the user can mend, however deep Ray wrapped it; None for a bug."""
    url = default_store() or "the storage"
    causes = list(_unwrapped(error))
    # What we worded ourselves says more than the bare error of the system underneath.
    for cause in causes:
        if isinstance(cause, FigmentError | StorageError):
            return redact(" ".join(_RETRIES.split(str(cause))[0].split()))
    for cause in causes:
        if isinstance(cause, OSError):
            return explain(cause, url)
    return None


def _unwrapped(error: BaseException) -> Iterator[BaseException]:
    """`error` and everything inside it: Ray's task errors, the failures of Ray Train's workers and its controller."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        error = waiting.pop(0)
        if id(error) in seen:
            continue
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None) or {}
        held = [*(getattr(error, name, None) for name in _WRAPPERS), *(failures[rank] for rank in sorted(failures))]
        inner = [e for e in held if isinstance(e, BaseException)]
        # A task error of Ray is made to look like its cause, an instance of its class even: only the cause counts.
        if not inner:
            yield error
        # `raise … from …`; a mere __context__ is history and no cause.
        waiting += [*inner, error.__cause__] if error.__cause__ else inner


_RETRIES = re.compile(r"\nFailed to .* after \d+/\d+ attempts")
"""What Ray Data writes below the message of whatever a mapped function raised."""

_WRAPPERS = ("cause", "_base_exc", "controller_failure", "health_check_failure")
"""Where RayTaskError, Ray Train's UserExceptionWithTraceback, ControllerError and health checks keep the true error."""


def connect_ray() -> None:
    """`ray.init` on the running cluster: `RAY_ADDRESS`, or the one that runs on this machine. Quiet.

    Raises `FigmentError` when there is none. A second call in the same process does nothing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level="warning", configure_logging=True)
    except (OSError, ray.exceptions.RayError) as error:
        raise FigmentError(
            f"no Ray cluster answers at {address!r} ({str(error).strip().splitlines()[0][:200]});"
            " start one with `make stack`, or set RAY_ADDRESS"
        ) from error
    settle_ray_data()


def _knock(address: str) -> None:
    """`OSError` when nothing listens at host:port. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in address and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def settle_ray_data() -> None:
    """Ray Data without progress bars and notices on the console, and with errors as they were raised.

    Otherwise an error in a mapped function arrives as a `UserCodeException` whose cause is lost on the way.
    """
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # the console; the log file of the Ray session keeps everything
            handler.setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True


def code_revision(code: Path = CODE, checkouts: Sequence[Path] = (CODE, Path(sys.prefix).parent)) -> str | None:
    """The commit of the packages in `code`, with "-dirty" behind it when they differ from it; None when nobody knows.

    FIGMENT_REVISION says it. Else the first of `checkouts` that is a repository is asked: a submitted job runs from a
    copy that leaves .git out, and its Python is that of the `.venv` in the checkout.
    """
    known = os.environ.get("FIGMENT_REVISION")
    if known:
        return known
    for checkout in checkouts:
        git = ["git", f"--git-dir={checkout / '.git'}", f"--work-tree={code}"]
        try:
            asked = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
            changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *PACKAGES], cwd=code, check=False)
        except (OSError, subprocess.CalledProcessError):
            continue  # no git here, or no repository there
        return asked.stdout.strip() + ("-dirty" if changed.returncode else "")
    return None
