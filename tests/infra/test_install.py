"""What `make` installs and what a submitted job takes along."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from infra import install
from pipelines.ray_private import job_package
from pipelines.recipes import RECIPES
from pipelines.recipes.recipe import Shipped

ROOT = Path(__file__).resolve().parents[2]
OURS = ("models", "pipelines", "jobs", "infra")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins)
    return {_normal(name): version for name, version in pins}


def test_every_dependency_is_pinned_for_any_machine():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {_normal(re.split(r"[\[<>=~! ]", dependency)[0]) for dependency in wanted}
    pins = _pins()
    assert names - set(pins) == set()
    assert [version for version in pins.values() if "+" in version] == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as the installation reads, with an environment that says it is complete."""
    (tmp_path / "infra").mkdir()
    for name in ("infra/install.py", "pyproject.toml", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").write_text(install.fingerprint())
    return tmp_path


def test_an_installation_is_not_repeated(checkout):
    for _ in range(2):
        (checkout / "pyproject.toml").touch()  # newer, but the same
        done = subprocess.run(
            ["make", "install", f"PYTHON={sys.executable}"], cwd=checkout, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_versions_are_installed(checkout, monkeypatch):
    (checkout / "constraints.txt").write_text("ray==0\n")
    monkeypatch.setattr(install, "ROOT", checkout)
    assert install.fingerprint() != (checkout / ".venv" / "installed").read_text()


def test_an_old_python_is_refused_in_a_sentence(checkout):
    old = checkout / "python-old"
    old.write_text('#!/bin/sh\ncase "$1" in -V) echo "Python 3.9.2";; *) exit 1;; esac\n')
    old.chmod(0o755)
    (checkout / ".venv" / "installed").unlink()
    done = subprocess.run(["make", "train", f"PYTHON={old}"], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"error: Figment needs Python 3.11 or newer, {old} is Python 3.9.2" in done.stderr


def test_the_end_of_a_failed_installation():
    assert install.last_words("Collecting x\nERROR: no such version\nWARNING: y\n") == "    ERROR: no such version"
    assert install.last_words("Killed\n") == "    Killed"


def test_a_job_takes_the_code_and_the_shipped_data_along_and_nothing_else(tmp_path):
    package = tmp_path / "package.zip"
    job_package(ROOT, package)
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        shipped = sum(info.compress_size for info in archive.infolist() if info.filename.startswith("data/"))
    code = {str(path.relative_to(ROOT)) for folder in OURS for path in (ROOT / folder).rglob("*.py")}
    assert code - set(names) == set()
    tops = {name.partition("/")[0] for name in names}
    assert tops & {".git", ".venv", ".figment", "docs", "out", "tests"} == set()
    assert not any("__pycache__" in name for name in names)
    for recipe in RECIPES.values():
        if isinstance(recipe.origin, Shipped):
            assert any(name.startswith(recipe.origin.path) for name in names), recipe.origin.path
    assert shipped < 14e6 and package.stat().st_size - shipped < 2**20
