"""Whole objects on a `pyarrow.fs.FileSystem`: an object is there completely or not at all.

Object stores show an object when its upload ends; a local file shows as it grows, so there it is written beside its
place and renamed. Payloads are handed over whole: leaving a pyarrow S3 stream by an exception would commit the half
that was written.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from pyarrow import fs as pafs


def write_object(fs: pafs.FileSystem, path: str, data: bytes | memoryview) -> None:
    """Write `data` to `path` so that no reader ever sees a part of it."""
    if not _is_local(fs):
        with fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return
    parent = path.rpartition("/")[0]
    if parent:
        fs.create_dir(parent, recursive=True)
    staging = f"{path}.part-{uuid.uuid4().hex[:8]}"
    try:
        with fs.open_output_stream(staging, compression=None) as stream:
            stream.write(data)
        fs.move(staging, path)
    except BaseException:
        if fs.get_file_info(staging).type != pafs.FileType.NotFound:
            fs.delete_file(staging)
        raise


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
    """Base names directly under `path`, sorted; empty when the folder is not there."""
    selector = pafs.FileSelector(path, allow_not_found=True)
    return sorted(info.base_name for info in fs.get_file_info(selector))


def _is_local(fs: pafs.FileSystem) -> bool:
    while isinstance(fs, pafs.SubTreeFileSystem):
        fs = fs.base_fs
    return isinstance(fs, pafs.LocalFileSystem)
