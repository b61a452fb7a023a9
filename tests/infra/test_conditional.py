"""Conditional writes on a real folder and a real S3 server: of many writers at once one wins, every time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra import conditional
from infra.conditional import FolderConditional, open_conditional
from infra.storage import StorageError, open_storage
from pipelines.objects import children
from tests.faults import Fault, FaultProxy

WRITERS = 16


def _rounds(url: str) -> range:
    """SeaweedFS lets writers of one key wait for one another in steps of a second, so few there."""
    return range(2 if url.startswith("s3:") else 20)


@pytest.fixture(params=["folder", "s3"])
def url(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3_store")[0]


def _at_once(attempt):
    """The results of `attempt(i)` of all writers, which begin together."""
    barrier = threading.Barrier(WRITERS)

    def run(i):
        barrier.wait()
        return attempt(i)

    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(run, range(WRITERS)))


def test_of_many_creators_one_wins(url):
    store = open_conditional(url)
    for turn in _rounds(url):
        path = f"runs/r{turn}/lease.json"
        bodies = [f"{turn} {i}".encode() for i in range(WRITERS)]
        won = _at_once(lambda i, path=path, bodies=bodies: store.create(path, bodies[i]))
        assert sum(won) == 1, won
        assert store.read(path)[0] == bodies[won.index(True)]


def test_of_many_replacers_one_wins(url):
    store = open_conditional(url)
    assert store.create("x", b"start")
    for turn in _rounds(url):
        _, tag = store.read("x")
        bodies = [f"{turn} {i}".encode() for i in range(WRITERS)]
        won = _at_once(lambda i, tag=tag, bodies=bodies: store.replace("x", bodies[i], tag))
        assert sum(won) == 1, won
        assert store.read("x")[0] == bodies[won.index(True)]


def test_in_processes_too(tmp_path):
    code = (
        "import sys; from infra.conditional import open_conditional\n"
        "store = open_conditional(sys.argv[1]); sys.stdin.readline()\n"
        "print(sum(store.create(f'k{i}', sys.argv[2].encode()) for i in range(50)))"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in "abc"
    ]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert sum(int(writer.communicate()[0]) for writer in writers) == 50


def test_what_is_not_there_and_what_has_changed(url):
    store = open_conditional(url)
    assert store.read("a/b") is None
    assert not store.replace("a/b", b"1", '"0123456789abcdef0123456789abcdef"')
    assert store.read("a/b") is None
    assert store.create("a/b", b"1")
    assert not store.create("a/b", b"2")
    _, tag = store.read("a/b")
    assert store.replace("a/b", b"2", tag)
    assert not store.replace("a/b", b"3", tag)
    assert store.read("a/b")[0] == b"2"
    assert children(open_storage(url), "a")[-1:] == ["b"]  # at its place for readers of the storage


def test_probe_and_staging_leave_nothing(url):
    store = open_conditional(url)
    store.create("a", b"1")
    left = children(open_storage(url), "")
    assert [name for name in left if not name.endswith(".lock")] == ["a"]


def test_a_lost_reply_is_not_taken_for_a_defeat(s3_store, monkeypatch):
    with FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        store = open_conditional(s3_store[0])
        proxy.set(Fault("drop", only="^PUT .*lease", times=1))
        assert store.create("lease", b"mine")
        assert proxy.faults == 1
        _, tag = store.read("lease")
        proxy.set(Fault("drop", only="^PUT .*lease", times=1))
        assert store.replace("lease", b"mine again", tag)
        assert proxy.faults == 1
        assert not store.replace("lease", b"later", tag)


def test_a_storage_that_is_not_there_is_an_oserror(s3_store, monkeypatch):
    with FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        store = open_conditional(s3_store[0])
        proxy.refuse()
        for ask in (
            lambda: store.read("x"),
            lambda: store.create("x", b""),
            lambda: store.replace("x", b"", "t"),
        ):
            with pytest.raises(OSError, match="NETWORK_CONNECTION"):
                ask()
        with pytest.raises(StorageError, match=rf"cannot reach the object storage .*{proxy.port}"):
            open_conditional(s3_store[0])


def test_a_storage_that_ignores_the_condition_is_refused(s3_store, monkeypatch):
    class Deaf(conditional.BucketConditional):
        """Sends no condition: as a server that does not know the headers."""

        def _put(self, path, body, **condition):
            return super()._put(path, body)

    monkeypatch.setattr(conditional, "BucketConditional", Deaf)
    with pytest.raises(StorageError, match="ignores conditional writes"):
        open_conditional(s3_store[0])
    assert children(s3_store[1], "") == []


def test_refused_credentials_and_no_bucket(s3_store, monkeypatch):
    with pytest.raises(StorageError, match="no bucket 'figmnet'"):
        open_conditional("s3://figmnet/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-secret")
    with pytest.raises(StorageError, match="refuses these credentials") as caught:
        open_conditional(s3_store[0])
    assert "wr0ng" not in str(caught.value)


def test_a_lock_that_is_never_given_back_is_an_error_and_not_an_endless_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(conditional, "LOCK_TIMEOUT_S", 0.05)
    store = FolderConditional(tmp_path)
    store.create("x", b"1")
    with (tmp_path / ".x.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="stays locked by another process"):
            store.create("x", b"2")
    assert not store.create("x", b"2")


@pytest.mark.parametrize("wrong", ["gs://bucket/x", "s3://", "https://host/x"])
def test_not_a_storage(wrong):
    with pytest.raises(StorageError, match="is not a storage url"):
        open_conditional(wrong)
