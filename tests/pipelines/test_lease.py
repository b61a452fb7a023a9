"""One owner at a time: real processes that live, are killed, are suspended; on a folder and on a real S3 server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.conditional import open_conditional
from infra.storage import open_storage
from pipelines.errors import FigmentError
from pipelines.lease import LeaseHeldError, LeaseLostError, Record, _acquire, _Seeker, current_token, hold
from pipelines.objects import write_object
from tests.faults import Fault, FaultProxy

LEASE = "runs/toy/lease.json"
TTL_S = 1.0
LIVING_TTL_S = 3.0  # where the owner must be seen to live, however slow the machine
ROOT = Path(__file__).resolve().parents[2]

# Holds the lease, says so, and then answers every line on its input with what it knows of the lease; "end" releases.
OWNER = """
import sys
from infra.conditional import open_conditional
from pipelines.lease import hold
url, path, name, ttl = sys.argv[1:]
with hold(open_conditional(url), path, name, float(ttl), say=lambda text: None) as lease:
    print(lease.fence, flush=True)
    for line in sys.stdin:
        if line == "end\\n":
            break
        if line == "wait until lost\\n":
            lease.lost.wait(60)
        print("lost" if lease.lost.is_set() else "held", flush=True)
"""


@pytest.fixture(params=["folder", "s3"])
def url(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3_store")[0]


class Owner:
    def __init__(self, url: str, name: str, ttl_s: float = TTL_S) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, url, LEASE, name, str(ttl_s)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def ask(self, question: str = "?") -> str:
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        return "" if question == "end" else self.line()


@pytest.fixture
def owner():
    """Starts owners; ends them all, suspended or not, at the end of the test."""
    owners = []

    def begin(*arguments) -> Owner:
        owners.append(Owner(*arguments))
        return owners[-1]

    yield begin
    for each in owners:
        each.process.kill()
        each.process.communicate()


def _until(condition):
    while not condition():
        time.sleep(0.02)


def _record(url: str) -> Record:
    return Record(**json.loads(open_conditional(url).read(LEASE)[0]))


def _silent(_: str) -> None: ...


def _take(store, name: str, ttl_s: float, say, patience_s: float) -> Record:
    return _acquire(_Seeker(store, LEASE, name, ttl_s, say, above=0), patience_s)


def test_acquired_and_released_and_fences_grow(url):
    store, fs = open_conditional(url), open_storage(url)
    assert current_token(fs, LEASE) is None
    for turn in (1, 2, 3):
        with hold(store, LEASE, f"me {turn}", TTL_S, say=pytest.fail) as lease:
            assert lease.fence == turn
            assert (current_token(fs, LEASE), _record(url).fence) == (lease.token, turn)
            lease.check()
        assert _record(url).released
    assert _record(url).fence == 3


def test_a_record_that_was_removed_gives_no_number_twice(tmp_path):
    store = open_conditional(str(tmp_path / "store"))
    for above, fence in ((4, 5), (0, 6), (9, 10)):  # no record; a record that knows more; one that knows less
        with hold(store, LEASE, "me", TTL_S, say=pytest.fail, above=above) as lease:
            assert lease.fence == fence


def test_a_living_owner_is_left_alone(url, owner):
    other = owner(url, "ann@one pid 7", LIVING_TTL_S)
    assert other.line() == "1"
    said = []
    with (
        pytest.raises(LeaseHeldError, match=r"runs/toy is in use by ann@one pid 7,.*wait until it has ended") as caught,
        hold(open_conditional(url), LEASE, "me", TTL_S, say=said.append),
    ):
        pytest.fail("two owners")
    assert "\n" not in str(caught.value)
    assert len(said) == 1
    assert "watching for 3 s whether it lives" in said[0]
    assert other.ask() == "held"
    other.ask("end")
    assert other.process.wait(60) == 0
    with hold(open_conditional(url), LEASE, "me", TTL_S, say=pytest.fail) as lease:
        assert lease.fence == 2


def test_it_stays_held_beyond_its_time_to_live(url):
    store = open_conditional(url)
    with hold(store, LEASE, "me", LIVING_TTL_S, say=_silent) as lease:
        _until(lambda: _record(url).renewals >= 4)
        with pytest.raises(LeaseHeldError):
            _take(store, "other", TTL_S, _silent, 60)
        lease.check()
        assert _record(url).token == lease._mine.token


def test_a_killed_owner_is_followed_by_exactly_one(url, owner):
    dead = owner(url, "dead")
    assert dead.line() == "1"
    dead.process.kill()
    dead.process.wait()
    store = open_conditional(url)
    fences, refused = [], []
    everyone_knows = threading.Barrier(4)

    def contend(i):
        try:
            with hold(store, LEASE, f"contender {i}", 10, say=_silent) as lease:
                fences.append(lease.fence)
                everyone_knows.wait(60)
        except LeaseHeldError:
            refused.append(i)
            everyone_knows.wait(60)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(contend, range(4)))
    assert fences == [2]
    assert len(refused) == 3


def test_fences_grow_over_kills_and_releases(url, owner):
    fences = []
    for how in ("kill", "release", "kill"):
        other = owner(url, how)
        fences.append(int(other.line()))
        if how == "kill":
            other.process.kill()
        else:
            other.ask("end")
        other.process.wait(60)
    with hold(open_conditional(url), LEASE, "me", TTL_S, say=_silent) as lease:
        fences.append(lease.fence)
    assert fences == [1, 2, 3, 4]


def test_a_suspended_owner_learns_that_it_lost_and_harms_nobody(url, owner):
    sleeper = owner(url, "sleeper")
    assert sleeper.line() == "1"
    sleeper.process.send_signal(signal.SIGSTOP)
    with hold(open_conditional(url), LEASE, "heir", TTL_S, say=_silent) as heir:
        assert heir.fence == 2
        sleeper.process.send_signal(signal.SIGCONT)
        assert sleeper.ask("wait until lost") == "lost"
        sleeper.ask("end")
        assert sleeper.process.wait(60) == 0
        mine = _record(url)
        assert (mine.fence, mine.holder, mine.released) == (2, "heir", False)
        _until(lambda: _record(url).renewals > mine.renewals)
        heir.check()


def test_a_lost_lease_says_who_has_it(store, tmp_path):
    conditional = open_conditional(str(tmp_path / "store"))
    with hold(conditional, LEASE, "me", TTL_S, say=_silent) as lease:
        thief = Record(7, "thief@two", "other", 0, TTL_S, released=False)
        write_object(store, LEASE, thief.to_bytes())
        assert lease.lost.wait(60)
        with pytest.raises(LeaseLostError, match=r"runs/toy belongs to thief@two now.*it stops here"):
            lease.check()
    assert current_token(store, LEASE) == "other"
    assert not _record(str(tmp_path / "store")).released


class Flaky:
    """A real store whose reads and writes fail while `down`."""

    def __init__(self, store):
        self.store, self.down, self.failed, self.reads = store, threading.Event(), 0, 0

    def _ask(self, call, *arguments):
        if self.down.is_set():
            self.failed += 1
            raise OSError("Connection refused")
        return call(*arguments)

    def read(self, path):
        self.reads += 1
        return self._ask(self.store.read, path)

    def create(self, path, body):
        return self._ask(self.store.create, path, body)

    def replace(self, path, body, tag):
        return self._ask(self.store.replace, path, body, tag)


def test_an_outage_loses_no_lease(tmp_path):
    store = Flaky(open_conditional(str(tmp_path)))
    with hold(store, LEASE, "me", 0.3, say=_silent) as lease:
        store.down.set()
        _until(lambda: store.failed >= 20)  # longer than its time to live
        store.down.clear()
        before = _record(str(tmp_path)).renewals
        _until(lambda: _record(str(tmp_path)).renewals > before)
        lease.check()
    assert _record(str(tmp_path)).released


def test_a_watch_begins_anew_after_a_failed_read(tmp_path):
    """The owner may have lost the storage too: once it is back, the owner has its whole time again."""
    store = Flaky(open_conditional(str(tmp_path)))
    _take(store, "dead", TTL_S, _silent, 60)
    with ThreadPoolExecutor(1) as pool:
        contender = pool.submit(_take, store, "heir", TTL_S, lambda _: store.down.set(), 60)
        _until(lambda: store.failed >= 8)  # looks are a fifth of the time to live apart
        store.reads = 0
        store.down.clear()
        assert contender.result(60).fence == 2
    assert store.reads >= 2


def test_a_renewal_that_meets_a_takeover_does_not_undo_it(tmp_path):
    """Suspended between its read and its write: only the condition of the write stops it then."""
    inner = open_conditional(str(tmp_path))

    class Overtaken(Flaky):
        def read(self, path):
            found = super().read(path)
            if found and Record(**json.loads(found[0])).fence == 1:
                heir = Record(2, "heir", "other", 0, TTL_S, released=False)
                assert inner.replace(path, heir.to_bytes(), found[1])
            return found

    with hold(Overtaken(inner), LEASE, "me", TTL_S, say=_silent) as lease:
        assert lease.lost.wait(60)
    assert (_record(str(tmp_path)).holder, _record(str(tmp_path)).released) == ("heir", False)


def test_a_storage_that_never_answers_is_told_at_once_and_one_that_fails_later_after_a_patience(tmp_path):
    store = Flaky(open_conditional(str(tmp_path)))
    store.down.set()
    with pytest.raises(OSError, match="refused"):
        _take(store, "me", TTL_S, _silent, 60)
    assert store.failed == 1
    store.down.clear()
    dead = _take(store, "dead", 0.2, _silent, 60)
    assert dead.fence == 1
    with pytest.raises(OSError, match="refused"):
        _take(store, "me", 0.2, lambda _: store.down.set(), 0.3)
    assert store.failed > 2


def test_a_lost_reply_at_each_step(s3_store, monkeypatch):
    with FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        store = open_conditional(s3_store[0])
        for fence in (1, 2):  # created; replaced
            # All tries of the write are done and no answer comes.
            proxy.set(Fault("drop", only="^PUT .*lease", times=2))
            try:
                record = _take(store, "me", TTL_S, _silent, 60)
            except OSError:
                assert fence == 1  # the first question may fail; the record stands all the same
                record = _record(s3_store[0])
            assert proxy.faults == 2
            assert record.fence == fence
            assert _record(s3_store[0]).token == record.token
            body, tag = store.read(LEASE)
            assert store.replace(LEASE, body.replace(b'"released": false', b'"released": true'), tag)


def test_every_record_has_one_size():
    """So none that is replaced while it is read comes cut."""
    records = [
        Record(f, h * 200, "t" * 32, r, 30.0, rel) for f, h, r, rel in [(1, "x", 0, False), (10**9, "ü", 10**9, True)]
    ]
    assert {len(record.to_bytes()) for record in records} == {2048}
    assert [Record(**json.loads(record.to_bytes())) for record in records] == records


def test_a_stranger_s_object_is_named(store, tmp_path):
    write_object(store, LEASE, b"[1, 2]")
    with pytest.raises(FigmentError, match=r"runs/toy/lease\.json is not the record of a lease .*delete it"):
        _take(open_conditional(str(tmp_path / "store")), "me", TTL_S, _silent, 60)


@pytest.mark.parametrize("record", [None, b"something else"])
def test_an_owner_whose_record_was_taken_away_stops(record, store, tmp_path):
    with hold(open_conditional(str(tmp_path / "store")), LEASE, "me", TTL_S, say=_silent) as lease:
        store.delete_file(LEASE) if record is None else write_object(store, LEASE, record)
        assert lease.lost.wait(60)
        with pytest.raises(LeaseLostError, match="belongs to nobody"):
            lease.check()
