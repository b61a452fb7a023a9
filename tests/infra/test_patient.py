"""A storage that fails as networks and servers do is waited for; what waiting does not mend is told at once."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from infra import patient as patience
from infra import storage
from infra.patient import PatientStorage, _outage
from infra.storage import StorageError, check_storage, explain, open_storage
from pipelines.objects import children, exists, read_object, write_object
from tests.faults import Fault, FaultProxy

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = os.urandom(300_000), os.urandom(300_000)
LARGE_OLD, LARGE_NEW = os.urandom(11 * 2**20), os.urandom(11 * 2**20)  # uploaded in two parts

FAULTS = {
    "refused": None,
    "reset": Fault("reset"),
    "500": Fault("error", status=500),
    "503": Fault("error", status=503),
    "hang": Fault("hang"),
    "dropped reply": Fault("drop"),
    "cut headers": Fault("cut headers"),
    "cut after the status": Fault("cut headers", keep=0.05),
    "cut body": Fault("cut body"),
}


@pytest.fixture
def proxy(s3_endpoint, monkeypatch):
    """In front of the S3 server; what is opened meanwhile goes through it, and its client does not try again itself."""
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.02)
    with FaultProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        yield proxy


class Outage:
    """The fault is there until the storage at `url` was seen to fail `tries` times; then all is well again."""

    def __init__(self, proxy: FaultProxy, url: str, fault: Fault | None, monkeypatch, tries: int = 2) -> None:
        self.proxy, self.fault, self.seen = proxy, fault, 0
        outage = _outage(url)
        told = outage.goes_on

        def goes_on(*arguments):
            told(*arguments)
            self.seen += 1
            if self.seen == tries:
                self.end()

        monkeypatch.setattr(outage, "goes_on", goes_on)

    def __enter__(self) -> Outage:
        if self.fault:
            self.proxy.set(self.fault)
        else:
            self.proxy.refuse()
        return self

    def end(self) -> None:
        self.proxy.accept()
        self.proxy.clear()

    __exit__ = lambda self, *_: self.end()  # noqa: E731


OPERATIONS = {
    "read": lambda fs: read_object(fs, "a/old"),
    "write": lambda fs: write_object(fs, "a/old", NEW),
    "list": lambda fs: children(fs, "a"),
    "info": lambda fs: fs.get_file_info("a/old").size,
    "delete": lambda fs: fs.delete_file("a/old"),
    "delete folder": lambda fs: fs.delete_dir("a"),
}


@contextlib.contextmanager
def _watched(fs: pafs.FileSystem, path: str):
    """What readers saw of `path` meanwhile."""
    seen, done = set(), threading.Event()

    def watch():
        while not done.wait(0.02):
            with contextlib.suppress(FileNotFoundError):
                seen.add(read_object(fs, path))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_is_survived(proxy, s3_store, monkeypatch, fault, operation):
    url, direct = s3_store
    write_object(direct, "a/old", OLD)
    write_object(direct, "a/other", b"other")
    fs = open_storage(url)
    watched = _watched(direct, "a/old") if operation == "write" else contextlib.nullcontext({OLD})
    with watched as seen, Outage(proxy, url, FAULTS[fault], monkeypatch) as outage:
        result = OPERATIONS[operation](fs)
    # The answers to these have no body, and the rest of their headers says nothing that matters.
    harmless = {"cut headers", "cut body"} if operation in ("info", "delete") else set()
    assert outage.seen >= (0 if fault in harmless else 2)
    assert seen <= {OLD, NEW}  # never a part of one
    if operation == "read":
        assert result == OLD
    elif operation == "list":
        assert result == ["old", "other"]
    elif operation == "info":
        assert result == len(OLD)
    left = {name: read_object(direct, f"a/{name}") for name in children(direct, "a")}
    after = {"write": {"old": NEW, "other": b"other"}, "delete": {"other": b"other"}, "delete folder": {}}
    assert left == after.get(operation, {"old": OLD, "other": b"other"})


@pytest.mark.parametrize("operation", ["delete", "delete folder"])
def test_a_deletion_whose_reply_is_lost_is_done(proxy, s3_store, monkeypatch, operation):
    """The second try finds nothing to delete: the first one did it."""
    url, direct = s3_store
    write_object(direct, "a/old", OLD)
    fs = open_storage(url)
    lost = Fault("drop", only=r"^DELETE|^POST [^?]*\?delete")
    with Outage(proxy, url, lost, monkeypatch, tries=1) as outage:
        OPERATIONS[operation](fs)
    assert outage.seen == 1
    assert not exists(direct, "a/old")


@pytest.mark.parametrize(
    ("kind", "only"),
    [
        *((kind, only) for kind in ("error", "drop") for only in ("^POST .*uploads", "partNumber=1", "partNumber=2")),
        *((kind, "^POST .*uploadId") for kind in ("error", "drop", "cut body")),
    ],
)
def test_an_upload_that_fails_at_one_step_shows_nothing_half(proxy, s3_store, monkeypatch, kind, only):
    url, direct = s3_store
    write_object(direct, "key", LARGE_OLD)
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 30.0)
    fs = open_storage(url)
    with _watched(direct, "key") as seen, Outage(proxy, url, Fault(kind, only=only), monkeypatch) as outage:
        write_object(fs, "key", LARGE_NEW)
    assert outage.seen >= 2
    assert seen <= {LARGE_OLD, LARGE_NEW}
    assert read_object(direct, "key") == LARGE_NEW


def test_without_patience_each_of_these_is_an_error(proxy, s3_store):
    """The control: the faults are real."""
    fs = open_storage(s3_store[0], patience_s=0)
    for fault in FAULTS.values():
        if fault:
            proxy.set(fault)
        else:
            proxy.refuse()
        with pytest.raises(OSError, match="AWS Error"):
            children(fs, "a")
        proxy.accept()
        proxy.clear()


def test_an_object_that_is_truly_empty(proxy, s3_store):
    fs = open_storage(s3_store[0])
    write_object(fs, "a/empty", b"")
    assert read_object(fs, "a/empty") == b""
    assert fs.get_file_info("a/empty").size == 0
    with pytest.raises(FileNotFoundError):
        read_object(fs, "a/nothing")
    assert not exists(fs, "a/nothing")


def test_patience_runs_out_in_one_error_that_says_so(proxy, s3_store, caplog):
    url, direct = s3_store
    fs = open_storage(url, patience_s=0.5)
    proxy.refuse()
    for operation in (lambda: read_object(fs, "x"), lambda: write_object(fs, "x", b"new")):
        with pytest.raises(OSError, match=r"Could not connect to server; waited \d+ s for it") as caught:
            operation()
        said = explain(caught.value, url)
        assert said.startswith(f"cannot reach the object storage of {url} at {proxy.url} (")
        assert "waited" in said
    proxy.accept()
    assert not exists(direct, "x")
    write_object(fs, "x", b"later")
    assert read_object(direct, "x") == b"later"


def test_what_waiting_does_not_mend_is_told_at_once(proxy, s3_store, monkeypatch):
    url, _ = s3_store
    fs = open_storage(url)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: pytest.fail("it waited"))
    proxy.set(Fault("error", status=403))
    for operation in OPERATIONS.values():
        with pytest.raises(OSError, match=r"ACCESS_DENIED|HTTP status 403") as caught:
            operation(fs)
        assert "refuses these credentials" in explain(caught.value, url)
    proxy.clear()
    for operation in ("read", "delete"):
        with pytest.raises(FileNotFoundError):
            OPERATIONS[operation](fs)
    lost = pafs.SubTreeFileSystem("figmnet", fs.base_fs)
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        write_object(lost, "x", b"x")


def test_opening_is_not_patient(proxy, s3_store):
    proxy.refuse()
    with pytest.raises(StorageError, match="cannot reach the object storage"):
        open_storage(s3_store[0])


def test_a_write_that_is_broken_off_stores_nothing(s3_store):
    fs = s3_store[1]
    with pytest.raises(KeyError, match="broken"), fs.open_output_stream("a/x") as stream:
        stream.write(b"half")
        raise KeyError("broken")
    stream = fs.open_output_stream("a/y")
    stream.write(b"half")
    del stream
    assert children(fs, "a") == []
    try:
        raise KeyError("told below")
    except KeyError:
        write_object(fs, "a/z", b"an error that is told while it is handled")
    assert children(fs, "a") == ["z"]


def test_memory_that_is_used_again_after_a_write(s3_store):
    fs = s3_store[1]
    memory = bytearray(b"first")
    with fs.open_output_stream("x") as stream:
        stream.write(memory)
        memory[:] = b"secnd"
        stream.write(memory)
    assert read_object(fs, "x") == b"firstsecnd"


def test_it_is_told_once_and_then_once_a_minute(proxy, s3_store, monkeypatch, caplog):
    url, _ = s3_store
    caplog.set_level(logging.INFO, "figment.storage")
    now = [0.0]
    outage = patience._Outage()
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    for second in range(131):
        now[0] = float(second)
        for _ in range(3):  # threads
            outage.goes_on(url, "Could not connect to server", 600 - second)
    outage.is_over(url)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "WARNING", "WARNING", "INFO"]
    assert f"waiting for the storage {url} since" in caplog.records[0].getMessage()
    assert caplog.records[0].getMessage().endswith(": Could not connect to server")
    assert caplog.records[-1].getMessage() == f"the storage {url} is back after 130 s"
    outage.goes_on(url, "reset", 600)
    outage.is_over(url)
    assert len(caplog.records) == 4  # a short one is not worth a word


def test_it_travels_to_other_processes(proxy, s3_store, monkeypatch):
    from ray import cloudpickle

    url, _ = s3_store
    monkeypatch.setenv("FIGMENT_STORAGE_PATIENCE_S", "77.5")
    fs = open_storage(f"{url}/deep")
    write_object(fs, "a/key", b"figment")
    inner = pafs.SubTreeFileSystem("a", fs)
    other = pickle.loads(pickle.dumps(inner))
    assert other == inner
    assert other != pafs.SubTreeFileSystem("a", open_storage(f"{url}/deep", patience_s=1))
    handler = other.base_fs.base_fs.handler
    assert isinstance(handler, PatientStorage)
    assert handler.patience_s == 77.5
    code = (
        "import pickle, sys\n"
        "fs = pickle.loads(sys.stdin.buffer.read())\n"
        "print(fs.open_input_file('key').readall().decode(), fs.base_fs.base_fs.handler.patience_s)\n"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FIGMENT_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=bare,
        input=cloudpickle.dumps(inner),
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == [b"figment", b"77.5"]


def test_a_whole_round_and_a_move(s3_store):
    fs = s3_store[1]
    check_storage(fs)
    write_object(fs, "a/from", NEW)
    fs.move("a/from", "a/to")
    assert children(fs, "a") == ["to"]
    assert read_object(fs, "a/to") == NEW
    fs.delete_dir_contents("a")
    assert children(fs, "a") == []


def test_an_object_that_goes_while_it_is_read_is_not_found(s3_store):
    """Between the question for its size and its body: S3's client has other words for that."""
    url, fs = s3_store
    write_object(fs, "x", OLD)
    handler = fs.base_fs.handler
    there = handler.base

    class Late:
        def open_input_file(self, path):
            file = there.open_input_file(path)
            there.delete_file(path)
            return file

    with pytest.raises(FileNotFoundError, match=r"NO_SUCH_KEY|RESOURCE_NOT_FOUND"):
        PatientStorage(Late(), 600, url).open_input_file(f"{url.removeprefix('s3://')}/x")


def test_a_folder_stays_as_it_is(store):
    assert isinstance(store.base_fs, pafs.LocalFileSystem)


@pytest.mark.parametrize("text", ["ten minutes", "-1", "inf", "nan"])
def test_a_patience_that_is_no_number_of_seconds(s3_store, monkeypatch, text):
    monkeypatch.setenv("FIGMENT_STORAGE_PATIENCE_S", text)
    with pytest.raises(StorageError, match=f"FIGMENT_STORAGE_PATIENCE_S is '{text}': it must be a number of seconds"):
        open_storage(s3_store[0])
