"""What waits to be sent to the tracking server: in memory for as long as the server answers, else in the run folder.

    runs/NAME/tracking-outbox/identity.json         who the run is, before the server has given it an id
    runs/NAME/tracking-outbox/00000012-1f3a….records records that could not be sent, oldest first

Delivery is *at least once and in order*: a record leaves the outbox only after the server took it, so whoever delivers
has to make a repetition harmless.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from pyarrow import fs as pafs

from pipelines.objects import children, exists, read_json, read_object, write_json, write_object
from pipelines.redaction import redact

_log = logging.getLogger(__name__)

BATCH = 500  # records handed to one delivery; many small ones cost the server one request
MEMORY_BYTES = 32 * 2**20  # of waiting records; more than this is moved to the run folder
_DROP_BYTES = 8 * MEMORY_BYTES  # reached only if server and storage both fail: then the oldest records are given up
_FIRST_RETRY_S, _LAST_RETRY_S = 0.5, 15.0
_LATE_RETRY_S = 60.0
_SUFFIX = ".records"


class Unreachable(Exception):
    """The server cannot take records now; the same ones are to be offered again later."""


@dataclass(frozen=True)
class Record:
    """One thing to tell the server. `body` is JSON; `session` names the process that made it."""

    kind: str  # "points", "params", "tags", "artifact", "dataset", "model" or "status"
    body: dict[str, Any]
    session: str
    payload: bytes = b""

    @property
    def size(self) -> int:
        """About what it takes in memory, in bytes."""
        return len(self.payload) + 200 + 60 * len(self.body.get("values", ()))


@dataclass(frozen=True)
class Identity:
    """Who a run is, independent of any server: `key` is found again as a tag, so one run is made once."""

    name: str
    tags: dict[str, str]
    run_id: str | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_s: float = field(default_factory=time.time)  # Unix time


class Outbox:
    """Records of one run at rest, under `folder` of `fs`."""

    def __init__(self, fs: pafs.FileSystem, folder: str) -> None:
        self._fs, self.folder = fs, folder

    def identity(self) -> Identity | None:
        path = f"{self.folder}/identity.json"
        return Identity(**read_json(self._fs, path)) if exists(self._fs, path) else None

    def remember(self, identity: Identity) -> None:
        write_json(self._fs, f"{self.folder}/identity.json", asdict(identity))

    def segments(self) -> list[str]:
        """Names, oldest first."""
        return [name for name in children(self._fs, self.folder) if name.endswith(_SUFFIX)]

    def keep(self, records: Sequence[Record]) -> str:
        """Write records as one new segment behind all others; returns its name."""
        index = [(r.kind, r.body, r.session, len(r.payload)) for r in records]
        head = json.dumps(index, allow_nan=False).encode()
        last = max((int(name.partition("-")[0]) for name in self.segments()), default=0)
        name = f"{last + 1:08d}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        data = b"".join([len(head).to_bytes(8, "big"), head, *(r.payload for r in records)])
        write_object(self._fs, f"{self.folder}/{name}", data)
        return name

    def read(self, name: str) -> list[Record]:
        data = read_object(self._fs, f"{self.folder}/{name}")
        start = 8 + int.from_bytes(data[:8], "big")
        records = []
        for kind, body, session, length in json.loads(data[8:start]):
            records.append(Record(kind, body, session, data[start : start + length]))
            start += length
        return records

    def drop(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # another process of the same run delivered it
            self._fs.delete_file(f"{self.folder}/{name}")


class Courier:
    """One background thread that carries records to the server, and to the outbox while the server does not answer.

    `connect()` is called until it succeeds once, then `deliver(records)` with records in the order of `put`; both say
    `Unreachable` when the server is to be tried again later. `deliver` returns those records that a living server did
    not take; they go to the outbox and are offered again later, so that they do not hold up the others. Nothing here
    ever raises into the caller.
    """

    def __init__(
        self, outbox: Outbox, connect: Callable[[], None], deliver: Callable[[Sequence[Record]], list[Record]]
    ) -> None:
        self._outbox, self._connect, self._deliver = outbox, connect, deliver
        self._memory: deque[Record] = deque()
        self._bytes = 0
        self._put = 0  # records taken over so far …
        self._safe = 0  # … and of these, delivered or written to the outbox
        self._kept: deque[str] = deque(outbox.segments())
        self._late: deque[str] = deque()  # segments that a living server did not take
        self._late_at = 0.0  # when they are offered again; time.monotonic()
        self._offered_last = False  # … which happens once more when closing
        self._changed = threading.Condition()
        self._keeping = threading.Lock()
        self._deadline: float | None = None  # set when closing; time.monotonic()
        self._connected = False
        self.trouble: str | None = None  # why the last attempt failed; None while all is well
        self.dropped = 0  # records given up because neither the server nor the storage took them
        self.attempted = threading.Event()  # the first attempt to connect is over, well or not
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Take over a record; microseconds, whatever the server does."""
        with self._changed:
            self._memory.append(record)
            self._bytes += record.size
            self._put += 1
            self._changed.notify_all()

    def settle(self, timeout_s: float) -> bool:
        """Deliver all that was put so far, or write it to the outbox: True when a `kill -9` now loses none of it."""
        with self._changed:
            target = self._put
            self._changed.wait_for(lambda: self._safe >= target or self.trouble is not None, timeout_s)
            if self._safe >= target:
                return True
        return self._keep()

    def close(self, timeout_s: float) -> int:
        """Deliver what is left for at most `timeout_s`, keep the rest in the outbox; number of segments left there."""
        with self._changed:
            self._deadline = time.monotonic() + timeout_s
            self._changed.notify_all()
        self._thread.join(timeout_s + 1)
        self._keep()  # nothing is left here unless the thread still waits for an answer
        return len(self._kept) + len(self._late)

    def _work(self) -> None:
        delay = _FIRST_RETRY_S
        while self._wait_for_work():
            try:
                if not self._connected:
                    self._connect()
                    self._connected = True
                    self.attempted.set()
                self._send_next()
            except (Unreachable, OSError) as error:  # OSError: the outbox could not be read
                if self.trouble is None:
                    _log.warning(
                        "tracking: %s; records are kept in %s and sent when it is back",
                        redact(str(error)),
                        self._outbox.folder,
                    )
                self.trouble = redact(str(error))
                self.attempted.set()
                self._keep()
                self._pause(delay)
                delay = min(2 * delay, _LAST_RETRY_S)
                continue
            if self.trouble is not None:
                _log.warning("tracking: the server answers again")
                self.trouble = None
            delay = _FIRST_RETRY_S
            if self._bytes > MEMORY_BYTES:
                self._keep()

    def _wait_for_work(self) -> bool:
        """False when closing and there is nothing left to do, or no time."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._memory or self._kept or not self._connected or self._deadline is not None,
                self._late_at - time.monotonic() if self._late else None,
            )
            closing = self._deadline is not None
            if time.monotonic() >= self._late_at or (closing and not self._offered_last):
                self._kept.extend(self._late)
                self._late.clear()
            self._offered_last = closing
            if self._deadline is None:
                return True
            return bool(self._memory or self._kept) and time.monotonic() < self._deadline

    def _pause(self, delay: float) -> None:
        """Wait before the next attempt; meanwhile keep memory bounded. Closing asks for a last attempt at once."""
        until = time.monotonic() + delay
        deadline = self._deadline
        while (left := min(until, deadline or until) - time.monotonic()) > 0:
            with self._changed:
                self._changed.wait_for(lambda: self._bytes > MEMORY_BYTES or self._deadline != deadline, left)
                if self._deadline != deadline:
                    return
            if self._bytes > MEMORY_BYTES and not self._keep():
                time.sleep(min(left, 1.0))

    def _send_next(self) -> None:
        """The oldest segment of the outbox when there is one, else a batch from memory."""
        if self._kept:
            name = self._kept[0]
            try:
                self._set_aside(self._deliver(self._outbox.read(name)))
                self._outbox.drop(name)
            except FileNotFoundError:
                _log.info("tracking: %s was delivered by another process of this run", name)
            except (ValueError, TypeError) as error:
                _log.warning("tracking: %s/%s is not readable, left as it is: %s", self._outbox.folder, name, error)
            self._kept.popleft()
            return
        with self._changed:
            batch = list(islice(self._memory, BATCH))
        if batch:
            self._set_aside(self._deliver(batch))
            self._release(batch)

    def _set_aside(self, records: Sequence[Record]) -> None:
        if records:
            self._late.append(self._outbox.keep(records))
            self._late_at = time.monotonic() + _LATE_RETRY_S

    def _keep(self) -> bool:
        """Move everything from memory to the outbox; False when the storage did not take it."""
        with self._keeping:
            with self._changed:
                batch = list(self._memory)
            if not batch:
                return True
            try:
                self._kept.append(self._outbox.keep(batch))
            except OSError as error:
                _log.warning("tracking: cannot write to %s: %s", self._outbox.folder, redact(str(error)))
                excess = self._too_many()
                self.dropped += len(excess)
                self._release(excess)
                return False
            self._release(batch)
            return True

    def _too_many(self) -> list[Record]:
        """The oldest records beyond the bound that memory must not pass."""
        with self._changed:
            records, excess = [], self._bytes - _DROP_BYTES
            for record in self._memory:
                if excess <= 0:
                    break
                records.append(record)
                excess -= record.size
            return records

    def _release(self, batch: Sequence[Record]) -> None:
        with self._changed:
            for record in batch:
                # Another thread may have moved it to the outbox meanwhile.
                if self._memory and self._memory[0] is record:
                    self._memory.popleft()
                    self._bytes -= record.size
                    self._safe += 1
            self._changed.notify_all()
