"""`python -m jobs.ingest` as a user runs it: from local, S3 and web sources, killed, without space, without rights."""

from __future__ import annotations

import functools
import hashlib
import http.server
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from infra.storage import open_storage
from pipelines.data.manifest import load_manifest, versions
from pipelines.objects import read_object, write_object
from tests.jobs.conftest import Shell, command, invisible, one_sentence
from tests.pipelines.data import archives
from tests.pipelines.data.archives import random_images

TRAIN, TEST = random_images(60, seed=1), random_images(20, seed=2)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    return archives.cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", [TRAIN], TEST)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Standard error is the job's."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The url of a real web server over `tmp_path`."""
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_local_archive_says_what_came_of_it(tmp_path: Path, cifar: Path, shell: Shell) -> None:
    """In a process of its own, as every user has it."""
    arguments = command(cifar, tmp_path / "store", "--dataset-name", "c", "--rows-per-shard", "25")
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    manifest = load_manifest(open_storage(str(tmp_path / "store")), "c")
    assert re.search(r"train +60 rows +3 shards", out) and re.search(r"test +20 rows +1 shards", out)
    assert f"complete: c@{manifest.version}" in out
    assert f"manifest   {tmp_path}/store/{manifest.folder}/manifest.json" in out
    again = shell.succeed(
        cifar, "--dataset-name", "c", "--rows-per-shard", "25", FIGMENT_STORE=f"file://{tmp_path}/store"
    )
    assert f"already there: c@{manifest.version}" in again


def test_dry_run_writes_nothing(tmp_path: Path, cifar: Path, shell: Shell) -> None:
    out = shell.succeed(cifar, tmp_path / "store", "--dataset-name", "c", "--dry-run")
    assert "cifar10-binary" in out and "3 x 32 x 32, stored as raw" in out and "nothing was written" in out
    assert not (tmp_path / "store").exists()


def test_the_web_is_a_source(tmp_path: Path, cifar: Path, web: str, shell: Shell) -> None:
    archives.idx(tmp_path / "mnist", random_images(30, (1, 28, 28)), random_images(9, (1, 28, 28)))
    name = cifar.name
    assert "60 rows" in shell.succeed(f"{web}/{name}", tmp_path / "store", "--dataset-name", "c")
    assert "30 rows" in shell.succeed(f"{web}/mnist", tmp_path / "store", "--dataset-name", "m")
    assert "30 rows" in shell.succeed(
        f"{web}/mnist/train-images-idx3-ubyte.gz", tmp_path / "store", "--dataset-name", "one-file"
    )
    secret = "Zq8-not-for-logs"
    where = web.replace("http://", f"http://someone:{secret}@")
    message = shell.fail(f"{where}/nothing.tar.gz?X-Amz-Signature={secret}", tmp_path / "store", "--dataset-name", "x")
    assert "nothing.tar.gz" in message and secret not in message


def test_s3_is_source_and_storage(
    s3_store: tuple[str, pafs.FileSystem], cifar: Path, tmp_path: Path, shell: Shell
) -> None:
    url, fs = s3_store
    write_object(fs, "archives/cifar.tar.gz", cifar.read_bytes())
    out = shell.succeed(f"{url}/archives/cifar.tar.gz", url, "--dataset-name", "c", "--rows-per-shard", "25")
    local = shell.succeed(cifar, tmp_path / "store", "--dataset-name", "c", "--rows-per-shard", "25")
    version = re.search(r"complete: (c@\w+)", local)
    assert version and f"complete: {version[1]}" in out
    assert load_manifest(fs, "c").rows("train") == 60
    # Nothing but the archive, the shards and the manifest is left behind.
    found = fs.get_file_info(pafs.FileSelector("datasets", recursive=True))
    assert sum(info.type == pafs.FileType.File for info in found) == 3 + 1 + 1


def test_wrong_credentials_leave_nothing(s3_store: tuple[str, pafs.FileSystem], cifar: Path, shell: Shell) -> None:
    url, fs = s3_store
    secret = "wrong-secret-that-nobody-may-see"
    message = shell.fail(cifar, url, "--dataset-name", "c", AWS_SECRET_ACCESS_KEY=secret)
    assert "credentials" in message and secret not in message
    assert invisible(fs, "c")


def test_an_unreachable_storage_is_said(cifar: Path, shell: Shell) -> None:
    message = shell.fail(cifar, "s3://bucket/x", "--dataset-name", "c", AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    assert "127.0.0.1:9" in message


def test_a_write_that_fails_leaves_no_manifest(tmp_path: Path, cifar: Path, shell: Shell) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    store = tmp_path / "store"
    arguments = command(cifar, store, "--dataset-name", "c", "--rows-per-shard", "100")
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=small_files_only)
    assert done.returncode == 2, done.stdout + done.stderr
    assert str(store) in one_sentence(done.stderr)
    assert invisible(open_storage(str(store)), "c")
    assert not [path for path in store.rglob("*") if path.is_file()]  # not even the half of a shard
    assert "complete" in shell.succeed(cifar, store, "--dataset-name", "c", "--rows-per-shard", "100")


def test_bad_input_is_one_sentence(tmp_path: Path, cifar: Path, shell: Shell) -> None:
    store = tmp_path / "store"
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(cifar.read_bytes()[:-9000])
    assert "cut.tar.gz" in shell.fail(cut, store, "--dataset-name", "c")
    assert "no such file" in shell.fail(tmp_path / "nothing", store, "--dataset-name", "c")
    assert "did you mean 'cifar10-binary'" in shell.fail(
        cifar, store, "--dataset-name", "c", "--format", "cifar10-binry"
    )
    assert "FIGMENT_STORE" in shell.fail(cifar, "--dataset-name", "c")
    assert "178 megapixels" in shell.fail(cifar, store, "--dataset-name", "c", "--max-megapixels", "500")
    assert invisible(open_storage(str(store)), "c")
    code, _, err = shell.run(cifar, store, "--dataset-name", "c", "--rows-per-shart", "5")
    assert code == 2 and "--rows-per-shard" in err
    assert "--on-bad-image" in shell.succeed("--help")


AT_ONCE = """
import os, sys
from jobs.ingest import main
from tests.jobs.conftest import Shell, command, invisible, one_sentence

children = []
for arguments in sys.argv[1:]:
    name, *rest = arguments.split("\\n")
    pid = os.fork()
    if not pid:
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 1)
        sys.argv[1:] = rest
        main()
        sys.exit()
    children.append(pid)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]))
"""
"""Processes that begin in the same moment, their imports done. Nothing has started a thread before they part."""


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_two_at_once_both_end_well(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """The same source twice, and another one under the same name; many small shards, so that they meet."""
    store = str(tmp_path / "store") if kind == "folder" else request.getfixturevalue("s3_store")[0]
    rows = "5" if kind == "folder" else "30"
    several = [random_images(600, seed=3), random_images(600, seed=4)]
    sources = [archives.cifar10_binary(tmp_path / f"{i}.tar.gz", [images], TEST) for i, images in enumerate(several)]
    outputs = [tmp_path / f"{i}.txt" for i in range(3)]
    runs = [
        "\n".join([str(out), str(source), store, "--dataset-name", "c", "--rows-per-shard", rows, "--mix-shards", "2"])
        for out, source in zip(outputs, (sources[0], sources[0], sources[1]), strict=True)
    ]
    done = subprocess.run([sys.executable, "-c", AT_ONCE, *runs], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [out.read_text() for out in outputs]
    names = [re.search(r"(?:complete|already there): (c@\w+)", out) for out in said]
    found = [name[1] for name in names if name]
    assert len(found) == 3 and found[0] == found[1] != found[2]
    fs = open_storage(store)
    assert {f"c@{manifest.version}" for manifest in versions(fs, "c")} == set(found)
    left = fs.get_file_info(pafs.FileSelector("datasets/c", recursive=True))
    assert not [info.path for info in left if ".ingest-" in info.path or ".part-" in info.path]
    for manifest in versions(fs, "c"):
        for shard in (shard for shards in manifest.splits.values() for shard in shards):
            data = read_object(fs, f"{manifest.root}/{shard.path}")
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
