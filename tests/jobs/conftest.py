"""`jobs.ingest` as a shell runs it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from jobs.ingest import main
from pipelines.data.manifest import load_manifest
from pipelines.errors import FigmentError


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "jobs.ingest", *map(str, arguments)]


@dataclass
class Shell:
    """Runs the job with its arguments and exit code as a shell would, but in this process, which has its imports."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def run(self, *arguments: str | Path, **env: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        self.capsys.readouterr()
        code = 0
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["jobs.ingest", *map(str, arguments)])
            for name, value in env.items():
                patch.setenv(name, value)
            try:
                main()
            except SystemExit as end:
                assert isinstance(end.code, int)
                code = end.code
        return code, *self.capsys.readouterr()

    def succeed(self, *arguments: str | Path, **env: str) -> str:
        code, out, err = self.run(*arguments, **env)
        assert code == 0, err
        return out

    def fail(self, *arguments: str | Path, **env: str) -> str:
        """The one sentence on stderr."""
        code, out, err = self.run(*arguments, **env)
        assert code == 2, out + err
        return one_sentence(err)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capsys, monkeypatch)


def one_sentence(err: str) -> str:
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


def invisible(fs: pafs.FileSystem, name: str) -> bool:
    with pytest.raises(FigmentError, match="no complete data set"):
        load_manifest(fs, name)
    return True
