"""Whole objects on a `pyarrow.fs.FileSystem`: an object is there completely or not at all.

Object stores show an object when its upload ends; a local file shows as it grows, so there it is written beside its
place under a hidden name, flushed to the disk, and renamed. Hidden names (a dot in front) are never listed: what a kill
left of them is nobody's object. Payloads are handed over whole: leaving a pyarrow S3 stream by an exception would
commit the half that was written.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs


def write_object(fs: pafs.FileSystem, path: str, data: bytes | memoryview) -> None:
    """Write `data` to `path` so that no reader ever sees a part of it, also after the machine lost its power."""
    local = _local_path(fs, path)
    if local is None:
        with fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return
    local.parent.mkdir(parents=True, exist_ok=True)
    staging = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}")
    try:
        with staging.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(local)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    _flush_folder(local.parent)


def read_object(fs: pafs.FileSystem, path: str) -> bytes:
    """The whole object; `FileNotFoundError` when there is none."""
    # Not a stream: pyarrow reads one from S3 to its end in many small requests, ten times slower.
    with fs.open_input_file(path) as file:
        return file.readall()


def write_json(fs: pafs.FileSystem, path: str, value: Any) -> None:
    write_object(fs, path, json.dumps(value, indent=2, sort_keys=True).encode())


def read_json(fs: pafs.FileSystem, path: str) -> Any:
    return json.loads(read_object(fs, path))


def exists(fs: pafs.FileSystem, path: str) -> bool:
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def children(fs: pafs.FileSystem, path: str) -> list[str]:
    """Base names directly under `path`, sorted; empty when the folder is not there. Hidden ones are left out."""
    try:
        found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    except FileNotFoundError:  # a local folder went between pyarrow's look at it and the listing
        return []
    return sorted(info.base_name for info in found if not info.base_name.startswith("."))


def remove_folder(fs: pafs.FileSystem, path: str) -> None:
    """Nothing is under `path` any more; harmless when nothing was."""
    if exists(fs, path):
        fs.delete_dir(path)


def _local_path(fs: pafs.FileSystem, path: str) -> Path | None:
    """Where an object lies on this machine's disk; None when it lies elsewhere."""
    while isinstance(fs, pafs.SubTreeFileSystem):
        path = f"{fs.base_path.rstrip('/')}/{path}"
        fs = fs.base_fs
    return Path(path) if isinstance(fs, pafs.LocalFileSystem) else None


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
