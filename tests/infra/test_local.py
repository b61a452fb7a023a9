"""The embedded stack for real: up, who may use it, a job through it, a part that dies, down.

The tests of this file use one stack and go in their order.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest

from infra import processes, servers
from infra.home import Credentials, Home, State
from infra.local import PARTS
from infra.processes import Running
from jobs.doctor import check_tracking

ROOT = Path(__file__).resolve().parents[2]


class Stack:
    def __init__(self, folder: Path, temp: Path):
        self.home = Home(folder)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_AUTH"))}
        self.env |= {"FIGMENT_HOME": str(folder), "TMPDIR": str(temp)}

    def command(self, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra.local", *words]
        env = {**self.env, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=400, check=False)

    @property
    def state(self) -> State:
        return State.load(self.home)

    @property
    def credentials(self) -> Credentials:
        return Credentials.load(self.home)

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.state.ports[port]}"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    # Not below pytest's own temp folder: the paths of unix sockets may not be long.
    temp = Path(os.path.realpath("/tmp")) / f"fgmt-{os.getpid()}"
    temp.mkdir(mode=0o700)
    one = Stack(tmp_path_factory.mktemp("stack") / "home", temp)
    try:
        assert one.command("status").returncode == 1
        assert "make stack" in one.command("run", "--", "true").stderr
        came_up = one.command("up")
        assert came_up.returncode == 0, came_up.stdout + came_up.stderr
        yield one
    finally:
        for running in one.state.running.values():
            processes.stop(running)
        subprocess.run(["rm", "-r", str(temp)], check=True)


def test_up_again_changes_nothing(stack):
    before = stack.state
    again = stack.command("up")
    assert again.returncode == 0
    assert again.stdout.count("(was up)") == 3
    assert stack.state == before


def test_status_has_a_line_for_each_part(stack):
    status = stack.command("status")
    assert status.returncode == 0
    *lines, login = status.stdout.splitlines()
    assert str(stack.home.credentials_file) in login
    assert stack.credentials.password not in status.stdout
    assert [line.split("  ")[1] for line in lines] == ["S3 server", "MLflow server", "Ray head"]
    for part, line in zip(PARTS, lines, strict=True):
        assert f"pid {stack.state.running[part].pid}" in line


def test_everything_listens_on_loopback_only(stack):
    listening = [
        (process.name(), connection.laddr.ip)
        for running in stack.state.running.values()
        for process in processes.session(running)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 10
    assert {ip.removeprefix("::ffff:") for _, ip in listening} == {"127.0.0.1"}, listening


def test_files_are_private_and_hold_no_secret_but_where_they_should(stack):
    assert stat.S_IMODE(stack.home.folder.stat().st_mode) == 0o700
    for path in (stack.home.credentials_file, stack.home.token_file, stack.home.folder / "mlflow" / "auth.ini"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = stack.credentials
    hidden = [keys.secret_key, keys.password, keys.session_key, stack.home.token_file.read_text()]
    public = [stack.home.state_file, *stack.home.folder.glob("logs/*.log")]
    for running in stack.state.running.values():
        for process in processes.session(running):
            assert not any(secret in " ".join(process.cmdline()) for secret in hidden)
    for path in public:
        assert not any(secret in path.read_text(errors="replace") for secret in hidden), path
    assert keys.secret_key not in repr(keys)


def test_whoever_has_no_login_is_refused(stack):
    search = "/api/2.0/mlflow/experiments/search"
    wrong = servers.basic_auth(stack.credentials.user, "wrong")
    for url, header, body in [
        (f"{stack.url('mlflow')}{search}", {}, {"max_results": 1}),
        (f"{stack.url('mlflow')}{search}", wrong, {"max_results": 1}),
        (f"{stack.url('mlflow')}/api/2.0/mlflow-artifacts/artifacts", {}, None),
        (f"{stack.url('mlflow')}/", {}, None),
        (f"{stack.url('dashboard')}/api/jobs/", {}, None),
        (f"{stack.url('dashboard')}/api/jobs/", {"Authorization": "Bearer wrong"}, None),
        (f"{stack.url('s3')}/figment", {}, None),
        (f"{stack.url('filer')}/buckets/figment/", {}, None),
        (f"{stack.url('volume')}/1,01", {}, None),
    ]:
        with pytest.raises(HTTPError) as refused:
            servers.ask(url, header, body)
        assert refused.value.code in (401, 403), url


def test_doctor_tells_a_wrong_login_from_a_right_one(stack, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", stack.credentials.user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", stack.credentials.password)
    assert check_tracking("here", stack.url("mlflow")).ok
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    finding = check_tracking("here", stack.url("mlflow"))
    assert not finding.ok
    assert "401" in finding.words
    assert "MLFLOW_TRACKING_PASSWORD" in finding.words


def test_env_is_what_a_shell_evaluates(stack):
    lines = stack.command("env").stdout
    shell = f'{lines}\necho "$FIGMENT_STORE|$MLFLOW_TRACKING_URI|$AWS_SECRET_ACCESS_KEY"'
    said = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout.strip()
    assert said == f"s3://figment|{stack.url('mlflow')}|{stack.credentials.secret_key}"


def test_run_gives_the_environment_and_the_exit_code(stack):
    code = (
        "import sys\n"
        "from infra.storage import default_store, open_storage; from pipelines.objects import write_object\n"
        "write_object(open_storage(default_store()), 'kept/key', b'before the crash'); sys.exit(7)"
    )
    assert stack.command("run", "--", sys.executable, "-c", code).returncode == 7
    missing = stack.command("run", "--", "no-such-program")
    assert missing.returncode == 2
    assert "error: cannot run no-such-program" in missing.stderr


def test_a_job_goes_through_it_and_its_exit_code_comes_back(stack, tmp_path):
    (tmp_path / "work.py").write_text(
        "import os, sys, ray\n"
        "ray.init(log_to_driver=False, logging_level='warning')\n"
        "told = ray.get(ray.remote(num_cpus=0)(lambda: os.environ['FIGMENT_STORE']).remote())\n"
        "print('the worker has', told, flush=True)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    for code in ("0", "5"):
        done = stack.command(
            "run", "--", sys.executable, "-m", "jobs.submit", "--", "python", "work.py", code, cwd=tmp_path
        )
        assert done.returncode == int(code), done.stderr
        assert done.stdout.splitlines() == [
            f"$ ray job submit --working-dir . -- python work.py {code}",
            "the worker has s3://figment",
        ]


def test_a_job_is_not_started_twice_and_stops_when_asked(stack, tmp_path):
    (tmp_path / "long.py").write_text("import time\nprint('at work', flush=True)\ntime.sleep(600)\n")
    command = [sys.executable, "-m", "infra.local", "run", "--", sys.executable, "-m", "jobs.submit", "--"]
    submit = functools.partial(
        subprocess.Popen,
        [*command, "python", "long.py"],
        env={**stack.env, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with submit() as first:
        assert first.stdout is not None
        assert first.stdout.readline().startswith("$ ray job submit")
        assert first.stdout.readline() == "at work\n"
        with submit() as second:
            assert second.stdout is not None
            assert "runs `python long.py` already; following it" in second.stdout.readline()
            assert second.stdout.readline() == "at work\n"
            first.send_signal(signal.SIGTERM)
            _, said = second.communicate(timeout=120)
            assert second.returncode == 2
            assert "ended as STOPPED" in said
        _, said = first.communicate(timeout=120)
        assert first.returncode == 130
        assert "stopped" in said


def test_a_dead_part_is_named_and_comes_back_with_its_data_even_on_another_port(stack):
    before = stack.state
    psutil.Process(before.running["s3"].pid).kill()
    psutil.wait_procs(processes.session(before.running["s3"]), timeout=30)
    status = stack.command("status")
    assert status.returncode == 1
    (dead,) = [line for line in status.stdout.splitlines() if "ended by itself" in line]
    assert dead.split("  ")[1] == "S3 server"
    assert f"the end of {stack.home.log('s3')}:" in status.stdout

    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", before.ports["s3"]))
        squatter.listen()
        up = stack.command("up")
    assert up.returncode == 0, up.stdout + up.stderr
    after = stack.state
    assert f"port {before.ports['s3']} (s3) is used by another program: {after.ports['s3']} from now on" in up.stdout
    assert "the Ray head must learn the new ports" in up.stdout
    assert after.running["mlflow"] == before.running["mlflow"]
    assert after.running["ray"] != before.running["ray"]
    assert not processes.alive(before.running["ray"])

    code = (
        "from infra.storage import default_store, open_storage; from pipelines.objects import read_object\n"
        "print(read_object(open_storage(default_store()), 'kept/key'))"
    )
    assert stack.command("run", "--", sys.executable, "-c", code).stdout == "b'before the crash'\n"


def test_down_stops_what_it_started_and_nothing_else(stack):
    state = stack.state
    members = [process for running in state.running.values() for process in processes.session(running)]
    assert len(members) > 10
    # As after a restart of the machine: the id is there again, but it is someone else's.
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        true_mlflow = state.running["mlflow"]
        state.running["mlflow"] = Running(stranger.pid, true_mlflow.born - 1000)
        state.save(stack.home)
        down = stack.command("down")
        assert down.returncode == 0, down.stderr
        assert "MLflow server  had ended" in down.stdout
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        processes.stop(true_mlflow)
    _, left = psutil.wait_procs(members, timeout=30)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
    assert json.loads(stack.home.state_file.read_text())["running"] == {}
    assert stack.command("status").returncode == 1
    assert stack.credentials.access_key  # data and logins stay
