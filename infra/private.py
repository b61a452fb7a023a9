"""Files and folders that no other user of the machine may read, at no moment of their making."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from infra.processes import StackError


def write_secret(path: Path, text: str) -> None:
    """Writes a file that only this user may read. A reader finds the old text or the new one, never none."""
    private_folder_for(path)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def private_folder_for(path: Path) -> None:
    """Makes the folder of `path`, for this user alone, unless it is there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def private_folder_in_temp(folder: Path) -> None:
    """Makes sure that `folder`, in a place where everyone may make files, is ours and that nobody else may enter it."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or folder.stat().st_uid != os.getuid())):
        raise StackError(f"{folder} belongs to someone else: have it removed, or set TMPDIR to another folder")
    if folder.exists() and folder.stat().st_mode & 0o077:
        shutil.rmtree(folder)  # others could put things there (an earlier version let them): nothing in it is trusted
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def empty_folder(folder: Path) -> None:
    """Empties `folder`, inside of one that is ours."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
