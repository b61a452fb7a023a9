"""Servers are started, watched and stopped by their session; nothing else is ever signalled."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from infra.private import write_secret
from infra.processes import (
    Running,
    Server,
    StackError,
    alive,
    free_ports,
    port_is_free,
    session,
    start,
    stop,
    tail,
    wait_or_start_again,
    wait_until_serving,
    why_silent,
)


def _server(folder: Path, code: str, **more) -> Server:
    def answers() -> None:
        if not (folder / "ready").exists():
            raise FileNotFoundError("ready")

    command = [sys.executable, "-c", code]
    return Server(
        "test server", "http://127.0.0.1", command, {}, folder, **{"answers": answers, "works": answers, **more}
    )


def test_starts_waits_and_stops_with_all_that_it_forked(tmp_path):
    # The child ignores the polite signal, and its parent dies first: it has to be found by the session, and killed.
    code = (
        "import pathlib, signal, subprocess, sys, time\n"
        "child = 'import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)'\n"
        "p = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); pathlib.Path('ready').touch(); time.sleep(600)\n"
    )
    server = _server(tmp_path, code)
    running = start(server, tmp_path / "x.log")
    wait_until_serving(server, running, tmp_path / "x.log")
    assert alive(running)
    members = session(running)
    assert len(members) == 2
    psutil.Process(running.pid).kill()
    psutil.Process(running.pid).wait()
    assert not alive(running)
    assert len(session(running)) == 1
    left = tmp_path / "left.sock"
    left.touch()
    stop(running, [left], grace_s=0.5)
    assert session(running) == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in members)
    assert not left.exists()


def test_server_that_dies_at_start_is_reported_with_its_log(tmp_path):
    server = _server(tmp_path, "raise SystemExit('the port is taken')")
    running = start(server, tmp_path / "x.log")
    with pytest.raises(StackError, match=r"(?s)test server ended while it started.*the port is taken"):
        wait_until_serving(server, running, tmp_path / "x.log")


def test_a_server_that_gave_up_is_started_again_as_often_as_it_allows(tmp_path):
    code = (
        "import pathlib, time\n"
        "if not pathlib.Path('once').exists(): pathlib.Path('once').touch(); raise SystemExit('too slow')\n"
        "pathlib.Path('ready').touch(); time.sleep(600)\n"
    )
    server = _server(tmp_path, code, starts=2)
    first, told = start(server, tmp_path / "x.log"), []
    running = wait_or_start_again(server, first, tmp_path / "x.log", told.append)
    try:
        assert told == [running]
        assert running != first and alive(running)
        assert "too slow" in (tmp_path / "x.previous.log").read_text()
    finally:
        stop(running)
    (tmp_path / "once").unlink()
    (tmp_path / "ready").unlink()
    once = replace(server, starts=1)
    with pytest.raises(StackError, match="ended while it started"):
        wait_or_start_again(once, start(once, tmp_path / "x.log"), tmp_path / "x.log")


def test_server_that_never_serves_is_reported(tmp_path):
    server = _server(tmp_path, "import time; print('warming up', flush=True); time.sleep(600)", patience_s=3.0)
    running = start(server, tmp_path / "x.log")
    try:
        with pytest.raises(StackError, match=r"(?s)does not serve after 3 s \(ready\).*warming up"):
            wait_until_serving(server, running, tmp_path / "x.log")
    finally:
        stop(running)


def test_a_process_that_got_the_id_later_is_left_alone(tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        true = Running(stranger.pid, psutil.Process(stranger.pid).create_time() - psutil.boot_time())
        assert alive(true)
        stale = replace(true, born=true.born - 100)
        assert not alive(stale)
        assert session(stale) == []
        stop(stale)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def _leaderless(folder: Path) -> tuple[int, psutil.Process]:
    """The number of a session whose leader has ended, and a process that is still in it."""
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
    )
    leader = subprocess.run(
        [sys.executable, "-c", f"import os; os.setsid(); print(os.getpid())\n{code}"],
        stdout=(folder / "pids").open("w"),
        check=True,
    )
    assert leader.returncode == 0
    number, child = map(int, (folder / "pids").read_text().split())
    return number, psutil.Process(child)


def test_the_children_of_a_stranger_whose_session_got_our_number_are_left_alone(tmp_path):
    number, child = _leaderless(tmp_path)
    try:
        assert not psutil.pid_exists(number)
        early = round(child.create_time() - psutil.boot_time() - 5, 2)
        for mark in ("", "0" * 32):  # as an earlier version recorded it, and as this one does
            stale = Running(number, early, mark)
            assert session(stale) == []
            stop(stale, grace_s=0.5)
            assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    finally:
        child.kill()


def test_a_leader_with_our_id_and_our_time_of_birth_but_without_our_mark_is_a_stranger(tmp_path):
    running = start(_server(tmp_path, "import time; time.sleep(600)"), tmp_path / "x.log")
    try:
        assert alive(running)
        other = replace(running, mark="0" * 32)
        assert not alive(other)
        assert session(other) == []
    finally:
        stop(running)
    assert not alive(running)


def test_a_child_that_lost_its_environment_is_known_by_its_parent(tmp_path):
    # As Ray's dashboard modules, which write their title over it.
    code = (
        "import pathlib, subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "middle = f'import subprocess, time; subprocess.Popen({sleep!r}, env={{}}); time.sleep(600)'\n"
        "subprocess.Popen([sys.executable, '-c', middle]); time.sleep(600)\n"
    )
    running = start(_server(tmp_path, code), tmp_path / "x.log")
    while len(session(running)) < 3:
        assert alive(running)
    psutil.Process(running.pid).kill()
    psutil.Process(running.pid).wait()
    members = session(running)
    assert len(members) == 2
    stop(running)
    assert not psutil.wait_procs(members, timeout=30)[1]


def test_a_busy_server_is_asked_again_before_it_counts_as_hanging(tmp_path, capsys):
    asked = []

    def answers() -> None:
        asked.append(1)
        if len(asked) < 3:
            raise TimeoutError("timed out")

    server = _server(tmp_path, "import time; time.sleep(600)", answers=answers)
    running = start(server, tmp_path / "x.log")
    try:
        assert why_silent(server, running, patience_s=60.0) is None
        assert len(asked) == 3
        assert "test server does not answer (timed out); asking again for 60 s" in capsys.readouterr().out
        asked.clear()
        assert f"pid {running.pid} runs but does not answer: timed out" == why_silent(server, running, patience_s=0.0)
    finally:
        stop(running)
    assert why_silent(server, running, patience_s=60.0) == f"it ended by itself (pid {running.pid})"


def test_a_server_is_up_when_it_works_and_not_when_it_answers(tmp_path):
    seen = []

    def works() -> None:
        seen.append(1)
        if len(seen) < 3:
            raise OSError("volume 1 not found")

    server = _server(tmp_path, "import time; time.sleep(600)", answers=lambda: None, works=works)
    running = start(server, tmp_path / "x.log")
    try:
        wait_until_serving(server, running, tmp_path / "x.log")
        assert len(seen) == 3
    finally:
        stop(running)


def test_what_a_server_writes_is_for_this_user_alone(tmp_path):
    code = "import pathlib; pathlib.Path('data').write_text('x'); print('log')"
    running = start(_server(tmp_path, code), tmp_path / "logs" / "x.log")
    psutil.Process(running.pid).wait()
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "logs" / "x.log").stat().st_mode) == 0o600


def test_a_reader_of_a_secret_finds_the_old_one_or_the_new_one(tmp_path):
    path, texts = tmp_path / "secret", ("a" * 1000, "b" * 1000)
    write_secret(path, texts[0])
    done = threading.Event()

    def rewrite() -> None:
        for turn in range(200):
            write_secret(path, texts[turn % 2])
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        assert path.read_text() in texts
    writer.join()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]


def test_variables_can_be_kept_from_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    code = "import os; print(os.environ.get('RAY_ADDRESS'), os.environ['MINE'])"
    server = replace(_server(tmp_path, code, without=("RAY_ADDRESS",)), environment={"MINE": "yes"})
    running = start(server, tmp_path / "x.log")
    psutil.Process(running.pid).wait()
    assert (tmp_path / "x.log").read_text() == "None yes\n"


def test_the_log_before_is_kept(tmp_path):
    for word in ("first", "second"):
        running = start(_server(tmp_path, f"print('{word}')"), tmp_path / "x.log")
        with suppress(psutil.NoSuchProcess):  # it may be gone already
            psutil.Process(running.pid).wait()
    assert (tmp_path / "x.log").read_text() == "second\n"
    assert (tmp_path / "x.previous.log").read_text() == "first\n"


def test_ports_are_free_distinct_and_have_a_free_partner():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        assert not port_is_free(held.getsockname()[1])
        ports = free_ports([f"p{i}" for i in range(50)], partner=10000)
    used = {p for port in ports.values() for p in (port, port + 10000)}
    assert len(used) == 100
    assert all(port_is_free(port) for port in used)


def test_tail(tmp_path):
    log = tmp_path / "x.log"
    assert "no log" in tail(log)
    log.write_text("\n".join(["old", *("[state-dump] counter" for _ in range(9)), "x" * 500, "last", ""]))
    assert tail(log, lines=3) == f"    old\n    {'x' * 240}\n    last"


def test_a_server_never_shows_its_secrets(tmp_path):
    server = replace(_server(tmp_path, ""), environment={"AWS_SECRET_ACCESS_KEY": "s3cret"})
    assert "s3cret" not in repr(server)


def test_ports_come_from_the_range_that_is_named(monkeypatch):
    monkeypatch.setenv("FIGMENT_PORTS", "21000-21004")
    assert set(free_ports(["a", "b", "c"]).values()) <= set(range(21000, 21005))
    with pytest.raises(StackError, match="no free port between 21000 and 21004"):
        free_ports([str(i) for i in range(6)])
    for wrong in ("x", "80-90", "3000-2000", "21000"):
        monkeypatch.setenv("FIGMENT_PORTS", wrong)
        with pytest.raises(StackError, match=f"FIGMENT_PORTS is '{wrong}'; it names the first and the last port"):
            free_ports(["a"])
