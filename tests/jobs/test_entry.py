"""A job ends with one sentence and exit code 2 for what the user can mend, also when Ray wrapped it."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.storage import StorageError
from jobs.entry import PACKAGES, code_revision, run_job, settle_ray_data, user_sentence
from pipelines.errors import FigmentError


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FigmentError("no recipe 'dcgam'"), 2, "error: no recipe 'dcgam'\n"),
        (StorageError("no bucket"), 2, "error: no bucket\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "no space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_code_and_one_line(error, code, said, capsys):
    with pytest.raises(SystemExit) as end:
        run_job(lambda: _raise(error))
    assert end.value.code == code
    stderr = capsys.readouterr().err
    assert said in stderr
    assert "Traceback" not in stderr
    assert stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        run_job(lambda: _raise(ZeroDivisionError("one over nothing")))
    assert end.value.code == 1
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert "one over nothing" in stderr
    assert "_raise" in stderr


def test_all_is_well():
    assert run_job(lambda: None) is None


def test_secrets_are_cut_from_the_sentence(monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret-s3cret")
    with pytest.raises(SystemExit):
        run_job(lambda: _raise(FigmentError("https://me:pass@host/x?X-Amz-Signature=abc and s3cret-s3cret")))
    assert capsys.readouterr().err == "error: https://host/x and ***\n"


def test_our_own_words_win_over_the_error_below():
    try:
        try:
            raise FileNotFoundError(errno.ENOENT, "No such file", "/x")
        except OSError as below:
            raise FigmentError("the manifest of cifar10 is missing") from below
    except FigmentError as error:
        assert user_sentence(error) == "the manifest of cifar10 is missing"


def test_a_bug_that_happened_while_handling_an_error_is_a_bug():
    try:
        try:
            raise OSError("disk")
        except OSError:
            raise TypeError("bug")  # noqa: B904 - on purpose: the OSError is history, not the cause
    except TypeError as error:
        assert user_sentence(error) is None


def test_no_cluster_is_said_in_a_sentence(tmp_path: Path):
    code = "from jobs.entry import connect_ray, run_job; run_job(connect_ray)"
    job = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "RAY_ADDRESS": "127.0.0.1:1", "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert job.returncode == 2, job.stderr
    assert "error: no Ray cluster answers at '127.0.0.1:1'" in job.stderr
    assert "make stack" in job.stderr
    assert "Traceback" not in job.stderr


def test_through_tasks_data_and_train(ray_cluster, tmp_path, capfd):
    import ray
    import ray.data
    import ray.train
    from ray.train.torch import TorchTrainer

    settle_ray_data()

    @ray.remote
    def wrong():
        raise FigmentError("the shard is damaged")

    @ray.remote
    def outer():
        return ray.get(wrong.remote())

    def mapped(batch):
        raise FigmentError("the image is damaged")

    def unwritable(batch):
        raise OSError(errno.ENOSPC, "No space left on device")

    def loop():
        raise FigmentError("loss of D is nan at step 3")

    capfd.readouterr()
    assert _sentence(lambda: ray.get(outer.remote())) == "the shard is damaged"
    assert _sentence(lambda: ray.data.range(2).map_batches(mapped).materialize()) == "the image is damaged"
    assert "no space left" in _sentence(lambda: ray.data.range(2).map_batches(unwritable).materialize())
    trainer = TorchTrainer(
        loop,
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(name="fails", storage_path=str(tmp_path)),
    )
    assert _sentence(trainer.fit) == "loss of D is nan at step 3"
    assert "Traceback" not in capfd.readouterr().err


def _sentence(call) -> str | None:
    with pytest.raises(Exception) as caught:
        call()
    return user_sentence(caught.value)


def test_a_job_that_runs_from_a_copy_knows_its_commit(tmp_path, monkeypatch):
    monkeypatch.delenv("FIGMENT_REVISION", raising=False)
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    for package in PACKAGES:
        (checkout / package).mkdir(parents=True)
        (checkout / package / "a.py").write_text("x = 1\n")
        shutil.copytree(checkout / package, copy / package)
    (checkout / "README.md").write_text("stays at home\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    assert code_revision(copy, [tmp_path, checkout]) == commit
    (copy / "jobs" / "a.py").write_text("x = 2\n")
    assert code_revision(copy, [checkout]) == f"{commit}-dirty"
    assert code_revision(copy, [tmp_path]) is None
    monkeypatch.setenv("FIGMENT_REVISION", "named")
    assert code_revision(copy, [checkout]) == "named"
