"""A filesystem that waits through the outages of its storage instead of raising what only time can mend.

Every operation is tried again, with growing pauses, until a stated patience has passed since its first failure. For
that, an operation has to be whole: an object is read completely before its reader sees a byte, and uploaded when its
writer closes. So one object must fit in memory; those of Figment do, and are read and written whole anyway.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from infra.failures import is_absence, is_transient, reason

log = logging.getLogger("figment.storage")

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
QUIET_S = 5.0  # shorter outages are not worth a word
REPEAT_S = 60.0


class StorageGoneError(OSError):
    """What was waited for in vain."""

    def __init__(self, text: str, waited_s: float) -> None:
        super().__init__(text)
        self.waited_s = waited_s

    def __reduce__(self) -> tuple[type[StorageGoneError], tuple[str, float]]:
        return type(self), (str(self), self.waited_s)


def patient(base: pafs.FileSystem, patience_s: float, name: str) -> pafs.FileSystem:
    """`base`, whose operations wait for up to `patience_s`; `name` is what people are told is failing."""
    return pafs.PyFileSystem(PatientStorage(base, patience_s, name)) if patience_s > 0 else base


class PatientStorage(pafs.FileSystemHandler):
    def __init__(self, base: pafs.FileSystem, patience_s: float, name: str) -> None:
        self.base, self.patience_s, self.name = base, patience_s, name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PatientStorage):
            return NotImplemented
        return self.base.equals(other.base) and self.patience_s == other.patience_s

    def __ne__(self, other: object) -> bool:  # pyarrow's handlers are asked for both
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return f"patient+{self.base.type_name}"

    def normalize_path(self, path: str) -> str:
        return self.base.normalize_path(path)

    # --- looking

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        def look() -> list[pafs.FileInfo]:
            found = self.base.get_file_info(paths)
            for info in found:
                if info.type == pafs.FileType.File and info.size == 0:
                    self._confirm_empty(info.path)
            return found

        return self._ask(look)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self._ask(lambda: self.base.get_file_info(selector))

    # --- changing

    def create_dir(self, path: str, recursive: bool) -> None:
        self._ask(lambda: self.base.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._ask(lambda: self.base.delete_dir(path), absence_is_success=True)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._ask(lambda: self.base.delete_dir_contents(path, missing_dir_ok=missing_dir_ok), absence_is_success=True)

    def delete_root_dir_contents(self) -> None:
        self._ask(lambda: self.base.delete_dir_contents("", accept_root_dir=True))

    def delete_file(self, path: str) -> None:
        self._ask(lambda: self.base.delete_file(path), absence_is_success=True)

    def move(self, src: str, dest: str) -> None:
        # As object stores do it. In two steps, each of which can be repeated.
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        self._ask(lambda: self.base.copy_file(src, dest))

    # --- reading and writing

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(self._ask(lambda: self._read(path)))

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(self._ask(lambda: self._read(path)))

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        def upload(data: pa.Buffer) -> None:
            def write() -> None:
                # One write, so that a stream that fails has taken nothing that its end could make visible.
                with self.base.open_output_stream(path, compression=None, metadata=metadata) as stream:
                    stream.write(data)

            self._ask(write)

        return pa.PythonFile(_Upload(upload, path), mode="w")

    def open_append_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        return self.base.open_append_stream(path, compression=None, metadata=metadata)  # object stores have none

    def _read(self, path: str) -> pa.Buffer:
        with self.base.open_input_file(path) as file:
            size = file.size()
            body = file.read_buffer(size)
        if body.size != size:
            raise ConnectionError(f"{path} came cut: {body.size} of {size} bytes")
        if size == 0:
            self._confirm_empty(path)
        return body

    def _confirm_empty(self, path: str) -> None:
        """An answer whose headers were cut looks like an empty object to the S3 client; a cut listing is an error."""
        folder = path.rpartition("/")[0]
        listed = self.base.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        if any(info.path == path and info.size for info in listed):
            raise ConnectionError(f"the answer about {path} came cut: it is not empty")

    # --- waiting

    def _ask(self, operation: Callable[[], Any], absence_is_success: bool = False) -> Any:
        """`absence_is_success`: what an earlier try of a deletion did, though its reply was lost, is done."""
        failing_since: float | None = None
        pause = FIRST_PAUSE_S
        while True:
            try:
                result = operation()
                break
            except OSError as error:
                if is_absence(error):
                    if absence_is_success and failing_since is not None:
                        result = None
                        break
                    raise FileNotFoundError(str(error)) from error
                if not is_transient(error):
                    raise
                now = time.monotonic()
                failing_since = failing_since if failing_since is not None else now
                waited = now - failing_since
                if waited >= self.patience_s:
                    raise StorageGoneError(f"{str(error).rstrip('.')}; waited {waited:.0f} s for it", waited) from error
                _outage(self.name).goes_on(self.name, reason(error), self.patience_s - waited)
                left = self.patience_s - waited
            # Between half of it and all of it, so that many workers do not come back in the same moment.
            time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(LONGEST_PAUSE_S, 2 * pause)
        if failing_since is not None:
            _outage(self.name).is_over(self.name)
        return result


class _Upload:
    """The Python file behind a pyarrow stream: keeps what is written and hands it over when it is closed.

    pyarrow closes a stream also when an exception leaves its `with` block, and does not say so. An exception under way
    now that was not at the opening tells: then nothing is written.
    """

    def __init__(self, upload: Callable[[pa.Buffer], None], path: str) -> None:
        self.closed = False
        self._upload, self._path = upload, path
        self._pieces: list[bytes | pa.Buffer] = []
        self._handled = sys.exception()

    def write(self, data: bytes | pa.Buffer) -> int:
        # A writer may use its memory again; bytes never change.
        mutable = isinstance(data, pa.Buffer) and data.is_mutable
        self._pieces.append(data.to_pybytes() if mutable else data)  # type: ignore[union-attr]
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        pieces, self._pieces = self._pieces, []
        leaving = sys.exception()
        if leaving is not None and leaving is not self._handled:
            log.warning("writing %s was broken off by an exception: nothing of it is stored", self._path)
            return
        self._upload(pa.py_buffer(pieces[0] if len(pieces) == 1 else b"".join(pieces)))


class _Outage:
    """What was said in this process about one storage: many threads fail at once, people want to hear it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._began = ""  # the same as a time of day
        self._said: float | None = None

    def goes_on(self, name: str, why: str, left_s: float) -> None:
        with self._lock:
            now = time.monotonic()
            if self._since is None:
                self._since, self._began = now, time.strftime("%H:%M:%S")
            recently = self._said is not None and now - self._said < REPEAT_S
            if now - self._since < QUIET_S or recently:
                return
            self._said = now
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + left_s))
            log.warning("waiting for the storage %s since %s, until %s: %s", name, self._began, until, why)

    def is_over(self, name: str) -> None:
        with self._lock:
            if self._said is not None and self._since is not None:
                log.info("the storage %s is back after %.0f s", name, time.monotonic() - self._since)
            self._since, self._said = None, None


_outages: dict[str, _Outage] = {}
_outages_lock = threading.Lock()


def _outage(name: str) -> _Outage:
    with _outages_lock:
        return _outages.setdefault(name, _Outage())
