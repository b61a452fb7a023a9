"""One owner at a time of a thing in the storage, say of a run: a lease kept by conditional writes.

The record is one small object that is never deleted, so its `fence` grows with every acquisition for ever; whoever
writes on the owner's behalf stops when the token in the storage is no longer the owner's (`current_token`). No two
clocks are compared: the owner changes the record three times in its time to live, and a contender watches it on its own
clock. A record that stands still for that long belongs to a dead owner and is taken over, by a write on the condition
that it still stands as watched, so of many contenders one wins.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from pyarrow import fs as pafs

from pipelines.errors import FigmentError

log = logging.getLogger("figment.lease")

RENEWALS_PER_TTL = 3
LOOKS_PER_TTL = 5
RELEASE_PATIENCE_S = 10.0
BYTES = 2048


class ConditionalStore(Protocol):
    """Small objects that are written only if nobody else wrote in between. Failures of the storage are `OSError`."""

    def read(self, path: str) -> tuple[bytes, str] | None:
        """(body, tag), None when there is no such object. Two bodies that differ have tags that differ."""

    def create(self, path: str, body: bytes) -> bool:
        """False when the object exists already."""

    def replace(self, path: str, body: bytes, tag: str) -> bool:
        """False when the object is not the one with that tag any more."""


class LeaseHeldError(FigmentError):
    """Somebody else holds the lease and lives."""


class LeaseLostError(FigmentError):
    """This process held the lease and somebody else does now."""


@dataclass(frozen=True)
class Record:
    fence: int
    holder: str  # for people
    token: str  # tells one's own write from another's when a reply was lost
    renewals: int  # tags come from the content, so each renewal must change it
    ttl_s: float  # the owner's, which a contender has to wait out
    released: bool

    def to_bytes(self) -> bytes:
        """Always of one size: a reader of S3 asks for the size first, and a longer record in between would be cut."""
        return json.dumps(asdict(self), sort_keys=True).encode().ljust(BYTES)


class Lease:
    """A lease that this process acquired. `lost` is set once another one is seen to hold it."""

    def __init__(self, store: ConditionalStore, path: str, record: Record) -> None:
        self.path = path
        self.fence = record.fence
        self.token = record.token
        self.lost = threading.Event()
        self._store = store
        self._mine = record
        self._heir = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {path}", daemon=True)

    def check(self) -> None:
        """Raises `LeaseLostError` when another owner has been seen. Asks the storage nothing."""
        if self.lost.is_set():
            raise LeaseLostError(
                f"{_thing(self.path)} belongs to {self._heir} now, because this process did not renew {self.path} for"
                f" {self._mine.ttl_s:g} s (suspended? cut off from the storage?): it stops here and leaves all to the"
                " new owner"
            )

    def _keep(self) -> None:
        every = self._mine.ttl_s / RENEWALS_PER_TTL
        pause = every
        while not self._ending.wait(pause) and not self.lost.is_set():
            try:
                self._write(released=False)
                pause = every
            except OSError as error:
                # Not lost: who could not be renewed is still the owner until somebody else has written.
                log.debug("could not renew %s: %s", self.path, error)
                pause = every / 5

    def _write(self, released: bool) -> None:
        """Renews or releases, if the record in the storage is still this lease's. Reading first needs no memory of
        what became of an earlier write whose reply was lost."""
        while True:
            found = self._store.read(self.path)
            if found is None:
                return self._lose("nobody (its record was removed)")
            try:
                record = _parse(found[0], self.path)
            except FigmentError:
                return self._lose("nobody (its record was overwritten)")
            if record.token != self._mine.token:
                return self._lose(record.holder)
            changed = replace(record, renewals=record.renewals + 1, released=released)
            if self._store.replace(self.path, changed.to_bytes(), found[1]):
                return None

    def _lose(self, heir: str) -> None:
        self._heir = heir
        self.lost.set()

    def _release(self) -> None:
        self._ending.set()
        self._thread.join()
        until = time.monotonic() + min(RELEASE_PATIENCE_S, self._mine.ttl_s)
        while not self.lost.is_set():
            try:
                self._write(released=True)
                return
            except OSError as error:
                if time.monotonic() > until:
                    # No error: the work is done, and the next owner only has to wait for the time to live.
                    log.warning(
                        "%s could not be released (%s): it is free again in %g s", self.path, error, self._mine.ttl_s
                    )
                    return
                time.sleep(self._mine.ttl_s / 30)


@contextmanager
def hold(
    store: ConditionalStore,
    path: str,
    holder: str,
    ttl_s: float = 30.0,
    say: Callable[[str], None] = print,
    patience_s: float = 600.0,
    above: int = 0,
) -> Iterator[Lease]:
    """Owns what `path` stands for until the block ends; `LeaseHeldError` when somebody else does and lives.

    The fence is more than `above`, the highest that is known to have been given: the record may have been removed.
    `say` is told once when an owner that may be dead has to be watched. A storage that fails is asked again for
    `patience_s`, except at the very first question: then its `OSError` is raised at once.
    """
    lease = Lease(store, path, _acquire(_Seeker(store, path, holder, ttl_s, say, above), patience_s))
    lease._thread.start()
    try:
        yield lease
    finally:
        lease._release()


def current_token(fs: pafs.FileSystem, path: str) -> str | None:
    """Which acquisition holds the lease, None when its record is gone; for workers, which do not hold it themselves.

    Unlike the fence it cannot come again when somebody removed the record.
    """
    try:
        with fs.open_input_file(path) as file:
            return _parse(file.readall(), path).token
    except FileNotFoundError:
        return None


def _acquire(seeker: _Seeker, patience_s: float) -> Record:
    failing_since: float | None = None
    while True:
        try:
            record = seeker.look()
            if record:
                return record
            failing_since = None
        except OSError:
            # The owner may have been as unable to write as this process is to read: it gets its whole time again.
            seeker.standing_since = None
            failing_since = failing_since if failing_since is not None else time.monotonic()
            if not seeker.answered or time.monotonic() - failing_since > patience_s:
                raise
        time.sleep(seeker.pause_s)


class _Seeker:
    """Looks at the record again and again until the lease is its own or somebody else is seen to live."""

    def __init__(
        self, store: ConditionalStore, path: str, holder: str, ttl_s: float, say: Callable[[str], None], above: int
    ) -> None:
        self.store, self.path, self.say = store, path, say
        self.first = Record(above + 1, holder[:200], secrets.token_hex(16), 0, ttl_s, released=False)
        self.answered = False  # whether the storage was ever read
        self.seen: bytes | None = None  # the record as read last
        self.standing_since: float | None = None  # when it was first read as it is now; None after a failure
        self.said = False
        self.pause_s = ttl_s / LOOKS_PER_TTL

    def look(self) -> Record | None:
        asked = time.monotonic()
        found = self.store.read(self.path)
        looked_before, self.answered = self.answered, True
        if found is None:
            self.seen = None
            return self.first if self.store.create(self.path, self.first.to_bytes()) else None
        body, tag = found
        changed, self.seen = looked_before and body != self.seen, body
        owner = _parse(body, self.path)
        if owner.token == self.first.token:
            return owner  # the reply to the write was lost, not the write
        if owner.released or self._stood_still(asked, changed, owner.ttl_s):
            wanted = replace(self.first, fence=max(owner.fence + 1, self.first.fence))
            return wanted if self.store.replace(self.path, wanted.to_bytes(), tag) else None
        if changed:
            raise LeaseHeldError(
                f"{_thing(self.path)} is in use by {owner.holder}, which renews its lease ({self.path}):"
                " wait until it has ended, or stop it, and repeat this command"
            )
        if self.standing_since is None:
            self.standing_since = time.monotonic()
        if not self.said:
            self.said = True
            self.say(
                f"{_thing(self.path)} was in use by {owner.holder}: watching for {owner.ttl_s:g} s whether it lives"
            )
        self.pause_s = owner.ttl_s / LOOKS_PER_TTL
        return None

    def _stood_still(self, asked: float, changed: bool, ttl_s: float) -> bool:
        """Whether the reads on both ends of a whole time to live, and all between, showed the very same record."""
        return not changed and self.standing_since is not None and asked - self.standing_since >= ttl_s


def _parse(body: bytes, path: str) -> Record:
    try:
        return Record(**json.loads(body))
    except (ValueError, TypeError) as error:
        raise FigmentError(
            f"{path} is not the record of a lease ({error}): when nobody uses {_thing(path)}, delete it"
        ) from error


def _thing(path: str) -> str:
    return path.rpartition("/")[0] or path
