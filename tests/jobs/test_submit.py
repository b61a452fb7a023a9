"""What a person sees of a submitted job. That it runs, ends and stops is shown on a real cluster in test_local.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from infra.processes import free_ports
from jobs.submit import _FRAME, overlay

ROOT = Path(__file__).resolve().parents[2]
STEP = "  {}/4 kimg  100 img/s  ETA 0:0{}\n"


def test_progress_lines_take_each_others_place():
    shown, live = overlay("start\n" + STEP.format(1, 3), live=False)
    assert (shown, live) == ("start\n\r\033[K  1/4 kimg  100 img/s  ETA 0:03", True)
    shown, live = overlay(STEP.format(2, 2) + STEP.format(3, 1), live)
    assert (shown, live) == ("\r\033[K  2/4 kimg  100 img/s  ETA 0:02\r\033[K  3/4 kimg  100 img/s  ETA 0:01", True)
    assert overlay("checkpoint saved\n", live) == ("\ncheckpoint saved\n", False)


def test_only_the_job_itself_is_shown():
    log = (
        "2026-01-02 03:04:05,678\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
        "Running entrypoint for job train-1: python -m jobs.train dcgan-demo\n"
        "first line of the job\n"
    )
    assert _FRAME.sub("", log) == "first line of the job\n"


def test_no_job_server_is_said_in_a_sentence():
    (port,) = free_ports(["nobody"]).values()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.submit", "--", "true"],
        env={**os.environ, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"error: no Ray job server answers at http://127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
