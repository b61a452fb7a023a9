"""Where two contenders for a lease, or a contender and a storage that fails, meet at the worst moment."""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from infra.conditional import open_conditional
from pipelines.lease import LeaseHeldError, Record, hold
from pipelines.lease import log as lease_log
from tests.pipelines.test_lease import LEASE, TTL_S, Flaky, _record, _silent, _take, _until


class Overtaken(Flaky):
    """Between the look and the write of the one that asks, somebody else writes."""

    def create(self, path, body):
        _take(self.store, "quicker", TTL_S, _silent, 60)
        return super().create(path, body)

    def replace(self, path, body, tag):
        _take(self.store, "quicker", TTL_S, _silent, 60)
        return super().replace(path, body, tag)


@pytest.mark.parametrize("known", [False, True])
def test_of_two_that_find_no_owner_the_slower_one_does_not_own(known, tmp_path):
    store = open_conditional(str(tmp_path))
    if known:
        with hold(store, LEASE, "earlier", TTL_S, say=_silent):
            pass
    with pytest.raises(LeaseHeldError, match="in use by quicker"):
        _take(Overtaken(store), "slower", TTL_S, _silent, 60)
    record = _record(str(tmp_path))
    assert (record.holder, record.fence) == ("quicker", 2 if known else 1)


def test_an_owner_that_renews_at_the_very_last_moment_lives(tmp_path):
    class LateOwner(Flaky):
        first_read = None

        def read(self, path):
            self.first_read = self.first_read or time.monotonic()
            if time.monotonic() - self.first_read >= 0.3:
                body, tag = self.store.read(path)
                changed = replace(Record(**json.loads(body)), renewals=7)
                self.store.replace(path, changed.to_bytes(), tag)
            return super().read(path)

    store = LateOwner(open_conditional(str(tmp_path)))
    _take(store.store, "late", 0.3, _silent, 60)
    with pytest.raises(LeaseHeldError, match="in use by late"):
        _take(store, "me", 0.3, _silent, 60)


def test_the_patience_with_a_storage_begins_anew_once_it_has_answered(tmp_path):
    class Hiccups(Flaky):
        """Two reads fail, further apart than the patience; the ones between succeed."""

        last = None

        def read(self, path):
            now = time.monotonic()
            if self.reads and self.failed < 2 and now - (self.last or 0) > 0.6:
                self.last = now
                self.down.set()
            try:
                return super().read(path)
            finally:
                self.down.clear()

    store = Hiccups(open_conditional(str(tmp_path)))
    _take(store.store, "dead", 2.0, _silent, 60)
    assert _take(store, "heir", 2.0, _silent, 0.5).fence == 2


def test_a_release_is_tried_again_and_given_up_with_a_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "figment.lease")  # whatever level the root logger was left with
    store, given_up = Flaky(open_conditional(str(tmp_path))), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with hold(store, LEASE, "me", 30, say=_silent):
            store.down.set()
            pool.submit(lambda: (_until(lambda: store.failed >= 2 or given_up.is_set()), store.down.clear()))
        given_up.set()
        assert _record(str(tmp_path)).released
    assert not caplog.messages
    with hold(store, LEASE, "me", 0.3, say=_silent) as lease:
        store.down.set()
    assert not _record(str(tmp_path)).released
    seen = (caplog.messages, lease.lost.is_set(), store.failed, lease_log.disabled, logging.root.handlers)
    assert any("lease.json could not be released (Connection refused)" in line for line in caplog.messages), seen
