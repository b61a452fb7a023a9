"""Where a stack keeps what: sockets with short paths, in a folder that nobody else may enter."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from infra.home import RAY_SOCKET, SOCKET_PATH, Home
from infra.private import private_folder_in_temp


@pytest.mark.parametrize("temp", ["/tmp", "/t", "/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T"])
def test_sockets_have_short_paths_and_lie_one_level_inside(monkeypatch, temp):
    monkeypatch.setattr(tempfile, "tempdir", temp)
    home = Home(Path("/somewhere/very/deep") / ("x" * 200))
    assert len(f"{home.ray_folder}{RAY_SOCKET}") <= SOCKET_PATH
    assert home.ray_folder.parent == home.private_folder
    assert home.private_folder.parent in (Path(temp), Path("/tmp"))


def test_what_others_could_write_to_is_not_trusted(tmp_path):
    folder = tmp_path / "figment-0-12345678"
    folder.mkdir()
    folder.chmod(0o777)  # as an earlier version left it
    (folder / "r").symlink_to("/etc")
    private_folder_in_temp(folder)
    assert [*folder.iterdir()] == []
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "s3.sock").touch()
    private_folder_in_temp(folder)
    assert [each.name for each in folder.iterdir()] == ["s3.sock"]
