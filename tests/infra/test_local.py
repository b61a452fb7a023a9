"""The embedded stack for real: up, who may use it, a job through it, a part that dies, down.

The tests of this file use one stack and go in their order.
"""

from __future__ import annotations

import functools
import json
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.error import HTTPError

import psutil
import pytest

from infra import checks, processes
from infra.parts import PARTS
from infra.processes import Running
from jobs.doctor import check_tracking

READ_FS = (
    "import sys; from pyarrow import fs as pafs; from infra.storage import default_store, open_storage\n"
    "from pipelines.objects import read_object, write_object\n"
    "fs = open_storage(default_store())"
)


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
    listening = []
    for _, process in stack.processes():
        with suppress(psutil.NoSuchProcess):
            listening += [
                (process.name(), connection.laddr.ip)
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
    for _, process in stack.processes():
        with suppress(psutil.NoSuchProcess):
            assert not any(secret in " ".join(process.cmdline()) for secret in hidden)
    for path in public:
        assert not any(secret in path.read_text(errors="replace") for secret in hidden), path
    assert keys.secret_key not in repr(keys)


def test_whoever_has_no_login_is_refused(stack):
    search = "/api/2.0/mlflow/experiments/search"
    wrong = checks.basic_auth(stack.credentials.user, "wrong")
    for url, header, body in [
        (f"{stack.url('mlflow')}{search}", {}, {"max_results": 1}),
        (f"{stack.url('mlflow')}{search}", wrong, {"max_results": 1}),
        (f"{stack.url('mlflow')}/api/2.0/mlflow-artifacts/artifacts", {}, None),
        (f"{stack.url('mlflow')}/", {}, None),
        (f"{stack.url('dashboard')}/api/jobs/", {}, None),
        (f"{stack.url('dashboard')}/api/jobs/", {"Authorization": "Bearer wrong"}, None),
        (f"{stack.url('s3')}/figment", {}, None),
    ]:
        with pytest.raises(HTTPError) as refused:
            checks.ask(url, header, body)
        assert refused.value.code in (401, 403), url


def test_a_login_that_was_right_is_not_hashed_at_every_request(stack):
    """The hash is slow on purpose. A wrong password is hashed each time, so it says how slow."""
    url = f"{stack.url('mlflow')}/api/2.0/mlflow/experiments/search"
    keys = stack.credentials

    def fastest(password: str) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            with suppress(HTTPError):
                checks.ask(url, checks.basic_auth(keys.user, password), {"max_results": 1})
            times.append(time.perf_counter() - began)
        return min(times)

    assert fastest(keys.password) < fastest("wrong") / 3


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
    code = f"{READ_FS}\nwrite_object(fs, 'kept/key', b'before'); sys.exit(7)"
    assert stack.command("run", "--", sys.executable, "-c", code).returncode == 7
    missing = stack.command("run", "--", "no-such-program")
    assert missing.returncode == 2
    assert "error: cannot run no-such-program" in missing.stderr


def test_status_and_the_question_who_runs_write_nothing(stack):
    def files() -> dict[str, tuple[int, int]]:
        written = [path for path in stack.home.folder.iterdir() if path.is_file()]
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [*written, auth]}

    auth = stack.home.folder / "mlflow" / "auth.ini"
    before = files()
    assert stack.command("status").returncode == 0
    assert stack.command("env").returncode == 0
    after = files()
    del before["lock"], after["lock"]
    assert after == before


def test_trying_the_parts_left_nothing_that_one_sees(stack):
    keys = stack.credentials
    login = checks.basic_auth(keys.user, keys.password)
    search = {"max_results": 10, "view_type": "ACTIVE_ONLY"}
    seen = checks.ask(f"{stack.url('mlflow')}/api/2.0/mlflow/experiments/search", login, search)
    assert [experiment["name"] for experiment in seen["experiments"]] == ["Default"]
    token = {"Authorization": f"Bearer {stack.home.token_file.read_text()}"}
    assert not [job for job in checks.ask(f"{stack.url('dashboard')}/api/jobs/", token) if job["entrypoint"] == "true"]
    names = stack.python(f"{READ_FS}\nprint([i.path for i in fs.get_file_info(pafs.FileSelector('', recursive=True))])")
    assert not any(word in names for word in (".probe-", "mlflow/")), names


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
        env=stack.env,
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


UP_AT_ONCE = """
import sys
from infra import local, plan
plan.PATIENCE_S = 2.0
raise SystemExit(local.main(sys.argv[1:]))
"""


@pytest.fixture
def busy(stack, tmp_path) -> Iterator[subprocess.Popen[bytes]]:
    """Someone follows a job that is at work; afterwards the job is stopped."""
    (tmp_path / "busy.py").write_text("import time\nprint('at work', flush=True)\ntime.sleep(600)\n")
    command = [sys.executable, "-m", "infra.local", "run", "--", sys.executable, "-m", "jobs.submit", "--"]
    job = subprocess.Popen([*command, "python", "busy.py"], env=stack.env, cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert job.stdout is not None
        while (line := job.stdout.readline()) != b"at work\n":
            assert line, "the job ended"
        yield job
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=120)
    finally:
        job.kill()
        job.communicate()


def test_a_head_with_running_jobs_is_never_replaced_unasked(stack, busy):
    before = stack.state
    (dashboard,) = [
        process
        for process in processes.session(before.running["ray"])
        if any(word.endswith("/dashboard/dashboard.py") for word in process.cmdline())
    ]
    dashboard.suspend()  # the job server hangs, as on a machine that swaps; the job goes on
    try:
        command = [sys.executable, "-c", UP_AT_ONCE, "up"]
        hangs = subprocess.run(command, env=stack.env, capture_output=True, text=True, timeout=400, check=False)
    finally:
        dashboard.resume()
    assert hangs.returncode == 2, hangs.stdout
    assert "does not answer" in hangs.stderr
    assert "`python busy.py`" in hangs.stderr
    assert "up --replace" in hangs.stderr
    assert "Traceback" not in hangs.stderr
    assert stack.state == before

    _kill(before.running["s3"])
    with _taken(before.ports["s3"]):
        moved = stack.command("up")
    assert moved.returncode == 2, moved.stdout
    assert f"port {before.ports['s3']} (s3) is used by another program" in moved.stderr
    assert "`python busy.py`" in moved.stderr
    assert stack.state == before, "S3 may come back where the job looks for it"
    assert busy.poll() is None

    back = stack.command("up")
    assert back.returncode == 0, back.stdout + back.stderr
    assert stack.state.running["ray"] == before.running["ray"]
    assert busy.poll() is None


def test_a_dead_part_is_named_and_comes_back_with_its_data_even_on_another_port(stack):
    log = (
        "import mlflow; mlflow.set_experiment('moves'); mlflow.start_run(run_name={name!r})\n"
        "mlflow.log_text('here', 'a.txt')"
    )
    stack.python(log.format(name="before"))
    before = stack.state
    _kill(before.running["s3"])
    status = stack.command("status")
    assert status.returncode == 1
    (dead,) = [line for line in status.stdout.splitlines() if "ended by itself" in line]
    assert dead.split("  ")[1] == "S3 server"
    assert f"the end of {stack.home.log('s3')}:" in status.stdout
    # Without storage MLflow answers, but does not work: no artifact arrives.
    login = checks.basic_auth(stack.credentials.user, stack.credentials.password)
    checks.mlflow_answers(stack.url("mlflow"), login)
    with pytest.raises(OSError, match=r"500|timed out"):
        checks.mlflow_works(stack.url("mlflow"), login)

    with _taken(before.ports["s3"]):
        up = stack.command("up")
    assert up.returncode == 0, up.stdout + up.stderr
    after = stack.state
    assert f"port {before.ports['s3']} (s3) is used by another program: {after.ports['s3']} from now on" in up.stdout
    for part, name in (("mlflow", "MLflow server"), ("ray", "Ray head")):
        assert f"the {name} is started again, because it must learn the new ports" in up.stdout
        assert after.running[part] != before.running[part]
        assert not processes.alive(before.running[part])

    stack.python(log.format(name="after"))
    fetch = (
        "import mlflow; runs = mlflow.search_runs(experiment_names=['moves'], output_format='list')\n"
        "text = lambda run: mlflow.artifacts.load_text(f'runs:/{run.info.run_id}/a.txt')\n"
        "print(sorted((run.info.run_name, text(run)) for run in runs))"
    )
    assert stack.python(fetch) == "[('after', 'here'), ('before', 'here')]\n"
    assert stack.python(f"{READ_FS}\nprint(read_object(fs, 'kept/key'))") == "b'before'\n"


def _kill(running: Running) -> None:
    leader = psutil.Process(running.pid)
    leader.kill()
    leader.wait(timeout=30)  # until then it holds its ports


@contextmanager
def _taken(port: int) -> Iterator[None]:
    """Another program listens there."""
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        yield


def test_down_stops_what_it_started_and_nothing_else(stack):
    state = stack.state
    members = [process for running in state.running.values() for process in processes.session(running)]
    assert len(members) > 10
    # As after a restart of the machine: the id is there again, born at the same second, but it is someone else's.
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    # As another version may have left it: a port that it did not know, a part and a field that this one does not know.
    body = json.loads(stack.home.state_file.read_text())
    del body["ports"]["volume_grpc"], body["ports"]["agent"]
    born = psutil.Process(stranger.pid).create_time() - psutil.boot_time()
    body["running"]["later"] = {"pid": stranger.pid, "born": born, "mark": "0" * 32, "told": "", "more": 1}
    stack.home.state_file.write_text(json.dumps(body))
    try:
        assert stack.command("status").returncode == 1
        down = stack.command("down")
        assert down.returncode == 0, down.stderr
        assert "later          had ended" in down.stdout
        assert down.stdout.count("stopped") == 3
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    _, left = psutil.wait_procs(members, timeout=30)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
    assert json.loads(stack.home.state_file.read_text())["running"] == {}
    assert stack.command("status").returncode == 1
    assert stack.credentials.access_key  # data and logins stay
