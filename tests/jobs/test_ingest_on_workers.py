"""`python -m jobs.ingest` of image files, which Ray's workers decode: killed, and of any length."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from infra.storage import open_storage
from pipelines.data.manifest import load_manifest
from tests.jobs.conftest import Shell, command, invisible
from tests.pipelines.data import archives
from tests.pipelines.data.archives import picture

ROOT = Path(__file__).parents[2]


def heavy(seed: int, side: int) -> bytes:
    """A PNG that takes some milliseconds to decode; ImageNet too has PNGs that are called JPEG."""
    return picture(seed, side, side, form="PNG")


def test_killed_and_repeated_gives_the_same_version(ray_cluster: str, tmp_path: Path, shell: Shell) -> None:
    pool = [heavy(i, 400) for i in range(10)]
    files = {f"n{i:08d}": [pool[(i * 7 + k) % 10] for k in range(60)] for i in range(10)}
    source = archives.imagenet_train(tmp_path / "ILSVRC2012_img_train.tar", files)
    options = ["--dataset-name", "k", "--size", "32", "--rows-per-shard", "20", "--mix-shards", "4"]
    store = tmp_path / "store"

    process = subprocess.Popen(
        command(source, store, *options),
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ray_cluster},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 200
        while len(list(store.glob("datasets/k/.ingest-*/*.json"))) < 5:
            assert process.poll() is None, (
                f"it ended before it could be killed: {process.stderr and process.stderr.read()!r}"
            )
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()
    assert invisible(open_storage(str(store)), "k")

    out = shell.succeed(source, store, *options)
    kept = re.search(r"600 images .* (\d+) of them were kept", out)
    assert kept and int(kept[1]) >= 5 * 20
    shell.succeed(source, tmp_path / "other", *options)
    one, two = (load_manifest(open_storage(str(folder)), "k") for folder in (store, tmp_path / "other"))
    assert one.version == two.version and one.splits == two.splits and one.channel_mean == two.channel_mean
    assert not list(store.glob("datasets/k/.ingest-*"))


OWN_MEMORY = """
import re, sys, threading, time
from jobs.ingest import main

peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
once, four_times, *options = sys.argv[1:]
for source in (once, four_times):
    peak = 0
    sys.argv[1:] = [source, *options]
    main()
    print("peak", peak / 1024)
"""
"""Prints the peaks of the process's own memory in MiB, without the pages of Ray's object store, which has a fixed size.
Not asked is getrusage: on Linux a child inherits its ru_maxrss from its parent."""


def test_memory_does_not_grow_with_the_archive(ray_cluster: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.bytes(300_000) for _ in range(4)]

    def archive(name: str, images: int) -> Path:
        files = {f"n{i:08d}": [picture(i) + noise[k % 4] for k in range(50)] for i in range(images // 50)}
        return archives.imagenet_train(tmp_path / f"{name}.tar", files)

    sources = [archive("once", 250), archive("four-times", 1000)]  # 75 and 300 MB
    options = ["--dataset-name", "m", "--size", "32", "--rows-per-shard", "25", "--mix-shards", "4"]
    done = subprocess.run(
        [sys.executable, "-c", OWN_MEMORY, *map(str, sources), str(tmp_path / "store"), *options],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ray_cluster},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    once, four_times = map(float, re.findall(r"^peak ([\d.]+)$", done.stdout, re.MULTILINE))
    assert four_times <= 1.3 * once, f"{once:.0f} MiB, {four_times:.0f} MiB"
