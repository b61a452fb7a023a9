"""One published file from the web onto this disk: it is there whole and with the published checksum, or not at all.

Until then it is `NAME.part`, which one process at a time writes (a lock on it) and a later call goes on with. Cuts,
stalls and failing servers are tried again, from where they broke off when the server can do that; then the next url is
asked. What decides is the published checksum: whatever was patched together and does not have it is fetched anew in one
piece, and what does not have it in one piece is thrown away.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn
from urllib import request
from urllib.error import HTTPError, URLError

from pipelines.errors import FigmentError

CHUNK = 1 << 18
LONGEST_PAUSE_S = 30.0
_NUMBER = "[0-9]{1,18}"
TEMPORARY = (408, 425, 429)  # beside all from 500 on


@dataclass(frozen=True)
class PublishedFile:
    """A file in the web that its publisher has given a checksum."""

    name: str
    bytes: int
    md5: str
    urls: tuple[str, ...]  # in order of preference


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for."""

    stall_s: float = 30.0  # without a byte
    tries: int = 5  # of one url, in a row, that bring the file no further
    pause_s: float = 1.0  # before the second try; twice as long before each later one


class _UrlError(Exception):
    """Why this url does not have the file; waiting does not help."""


class _TryAgainError(Exception):
    """Why this try did not bring the whole file."""


def is_whole(file: PublishedFile, path: Path) -> bool:
    """Whether `path` has the published length and checksum."""
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    with path.open("rb") as stream:
        return _md5(stream) == file.md5


def fetch(
    file: PublishedFile,
    target: Path,
    *,
    patience: Patience | None = None,
    on_progress: Callable[[int], object] = lambda got: None,
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """Brings `file` to `target`, if it is not there yet. `on_progress` gets the bytes that lie here, `say` what went
    wrong and is tried again. Raises `FigmentError` when no url has the file or it cannot be written.
    """
    try:
        if is_whole(file, target):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise FigmentError(f"{target} is a folder, where {file.name} is to lie: remove it, or set FIGMENT_CACHE")
        with _alone(target, say) as part:
            if not is_whole(file, target):  # as it is when another process brought it meanwhile
                _Download(file, part, patience or Patience(), on_progress, say).run()
                _part(target).replace(target)
    except OSError as error:  # of the disk: those of the network are worded where they come up
        raise FigmentError(
            f"{file.name} cannot be written to {target.parent} ({error.strerror or error}): it takes"
            f" {file.bytes:,} bytes there; free some space, or set FIGMENT_CACHE to another folder;"
            " the same command goes on"
        ) from error


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


@contextmanager
def _alone(target: Path, say: Callable[[str], object]) -> Iterator[FileIO]:
    path = _part(target)
    while True:
        # Never through a link: what somebody let this name stand for would be overwritten.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        with FileIO(handle, "a+") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process is downloading {target.name}: waiting for it")
                fcntl.flock(part, fcntl.LOCK_EX)
            # Whoever had the lock may have renamed or deleted the file that it is a lock on.
            if not _is_at(part, path):
                continue
            try:
                yield part
            finally:
                if _is_at(part, path) and os.fstat(part.fileno()).st_size == 0:
                    path.unlink()
            return


def _is_at(part: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(part.fileno()), path.lstat())
    except FileNotFoundError:
        return False


@dataclass
class _Download:
    """One file on its way into `part`, which this process alone writes."""

    file: PublishedFile
    part: FileIO
    patience: Patience
    on_progress: Callable[[int], object]
    say: Callable[[str], object]
    version: str | None = None  # of what the url gave before, in the server's own words

    @property
    def got(self) -> int:
        return os.fstat(self.part.fileno()).st_size

    def run(self) -> None:
        """From the first url that has it."""
        why: list[str] = []
        for url in self.file.urls:
            if why:
                self.say(f"{why[-1]}; asking {url}")
            try:
                return self._from(url)
            except _UrlError as error:
                why.append(f"{url} {error}")
        raise FigmentError(f"{self.file.name} cannot be downloaded: {'; '.join(why)}")

    def _from(self, url: str) -> None:
        self.version, failed, furthest = None, 0, self.got
        while True:
            try:
                begin = self.got
                if begin != self.file.bytes:
                    begin = self._get(url, begin)
                return self._check(in_one_piece=begin == 0)
            except _TryAgainError as error:
                why = str(error)
            failed = 1 if self.got > furthest + self.file.bytes // 100 else failed + 1
            furthest = max(furthest, self.got)
            if failed >= self.patience.tries:
                raise _UrlError(f"{why} (tried {failed} times)")
            pause = min(self.patience.pause_s * 2 ** (failed - 1), LONGEST_PAUSE_S)
            self.say(f"{url} {why}; try {failed + 1} of {self.patience.tries} in {pause:.2g} s")
            time.sleep(pause)

    def _get(self, url: str, begin: int) -> int:
        """Appends what is missing, or all of it to an emptied `part`; the byte at which the answer began."""
        asked = {"Accept-Encoding": "identity", "User-Agent": "figment"}
        if 0 < begin < self.file.bytes:
            asked["Range"] = f"bytes={begin}-"
            if self.version:
                asked["If-Range"] = self.version  # the whole file, if it is another one by now
        with self._open(url, asked) as answer:
            begin = self._begin(answer, begin)
            etag = answer.headers.get("ETag", "")
            self.version = answer.headers.get("Last-Modified") if not etag or etag.startswith("W/") else etag
            while data := self._read(answer):
                view = memoryview(data)
                while view:
                    view = view[self.part.write(view) :]
                self.on_progress(self.got)
                if self.got > self.file.bytes:
                    self.part.truncate(0)
                    raise _UrlError(f"goes on after the {self.file.bytes:,} bytes of the published file")
        if self.got < self.file.bytes:
            raise _TryAgainError(f"broke off after {self.got:,} of {self.file.bytes:,} bytes")
        return begin

    def _begin(self, answer: HTTPResponse, asked: int) -> int:
        """The byte at which the answer begins; `part` is emptied when that is 0."""
        length = answer.headers.get("Content-Length", "")
        whole = int(length) if re.fullmatch(_NUMBER, length) else None
        if answer.status == 206:
            part = answer.headers.get("Content-Range", "").strip()
            found = re.fullmatch(rf"bytes ({_NUMBER})-{_NUMBER}/({_NUMBER}|\*)", part)
            if found is None or int(found[1]) != asked:
                self.part.truncate(0)
                raise _TryAgainError("sent another part than was asked for")
            whole = None if found[2] == "*" else int(found[2])
        else:
            asked = 0
        if whole is not None and whole != self.file.bytes:
            raise _UrlError(f"has {whole:,} bytes, the published file {self.file.bytes:,}")
        if asked == 0:
            self.part.truncate(0)
        return asked

    def _open(self, url: str, asked: dict[str, str]) -> HTTPResponse:
        try:
            answer = _WEB.open(request.Request(url, headers=asked), timeout=self.patience.stall_s)
            assert isinstance(answer, HTTPResponse)
            return answer
        except HTTPError as error:
            error.close()
            if error.code == 416:
                self.part.truncate(0)
                raise _TryAgainError("has no such part") from error
            if error.code < 400:
                raise _UrlError("redirects in a circle, or to what is no web address") from error
            kind = _TryAgainError if error.code in TEMPORARY or error.code >= 500 else _UrlError
            raise kind(f"answers {error.code} {_printable(error.reason)}".strip()) from error
        except (OSError, HTTPException) as error:
            self._failed(error)
        except ValueError as error:  # in an address, also in one that a server or a proxy setting sends us to
            raise _UrlError(f"is no address that can be asked, or leads to none ({_printable(error)})") from error

    def _read(self, answer: HTTPResponse) -> bytes:
        try:
            return answer.read1(CHUNK)
        except (OSError, HTTPException) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> NoReturn:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise _UrlError(f"has a certificate that cannot be verified ({cause.verify_message})") from error
        if isinstance(cause, TimeoutError):
            raise _TryAgainError(f"sent nothing for {self.patience.stall_s:g} s") from error
        if isinstance(cause, str):
            raise _UrlError(f"cannot be asked ({_printable(cause)})") from error
        raise _TryAgainError(f"broke off ({_printable(cause) or type(cause).__name__})") from error

    def _check(self, in_one_piece: bool) -> None:
        self.part.seek(0)
        got = _md5(self.part)
        if got == self.file.md5:
            return
        self.part.truncate(0)
        if not in_one_piece:
            raise _TryAgainError(f"continues another file (md5 {got}, published {self.file.md5}), so from its start")
        raise _UrlError(f"has another file: its md5 is {got}, the published one {self.file.md5}")


def _printable(what: object) -> str:
    """In one line, without the control characters that a server may have put in."""
    return "".join(character for character in " ".join(str(what).split()) if character.isprintable())


def _md5(stream: Any) -> str:
    return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


_WEB = request.OpenerDirector()  # of http and https alone: urllib's own would follow a redirection to ftp
for _name in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect"):
    _WEB.add_handler(getattr(request, f"{_name}Handler")())
_WEB.add_handler(request.HTTPErrorProcessor())
