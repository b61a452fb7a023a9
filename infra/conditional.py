"""Writes that happen only if nobody else wrote in between: the ground on which `pipelines.lease` stands.

S3 has them as `If-None-Match` and `If-Match` (pyarrow does not, so this goes through boto3); in a folder a lock of the
kernel, which dies with the process that holds it, makes compare-and-swap of a whole file.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from infra.storage import StorageError, explain, local_path, redact, s3_client_options

# One request must not outlive a lease that it should renew (30 s by default): with the second try 17 s at worst.
CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 5.0
ATTEMPTS = 2
CONFLICTS = 20  # S3 answers 409 when two conditional writes meet and it wants the loser to ask again
LOCK_TIMEOUT_S = 10.0


class ConditionalStore(Protocol):
    """The same as `pipelines.lease.ConditionalStore`, which says what the parts promise."""

    def read(self, path: str) -> tuple[bytes, str] | None: ...
    def create(self, path: str, body: bytes) -> bool: ...
    def replace(self, path: str, body: bytes, tag: str) -> bool: ...


def open_conditional(url: str) -> ConditionalStore:
    """The conditional writes of the storage at `url`, which is one of those that `infra.storage.open_storage` takes.

    Raises `StorageError` when the storage cannot be reached, or takes writes whose condition does not hold.
    """
    parts = urlsplit(url)
    try:
        if parts.scheme == "s3" and parts.netloc:
            bucket = BucketConditional(parts.netloc, parts.path.strip("/"))
            _probe(bucket, url)
            return bucket
        if parts.scheme in ("", "file"):
            folder = local_path(unquote(parts.path) if parts.scheme else url)
            folder.mkdir(parents=True, exist_ok=True)
            return FolderConditional(folder)
    except OSError as error:
        raise StorageError(explain(error, url)) from error
    raise StorageError(f"{redact(url)} is not a storage url: use s3://bucket/prefix, file:///folder or a plain folder")


class BucketConditional:
    """Below `prefix` of an S3 bucket; the tag of an object is its ETag."""

    def __init__(self, bucket: str, prefix: str) -> None:
        import boto3  # here: only who writes conditionally pays for it
        from botocore.config import Config

        options = s3_client_options()
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            max_pool_connections=32,
            request_checksum_calculation="when_required",  # others than AWS may not know the newer checksums
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if options.get("endpoint_url") else "auto"},
            proxies={},  # pyarrow asks no proxy of the environment either
        )
        self._client = boto3.session.Session().client("s3", config=config, **options)
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""

    def read(self, path: str) -> tuple[bytes, str] | None:
        try:
            with _os_errors():
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + path)
                return answer["Body"].read(), answer["ETag"]
        except _RefusedError as refused:
            if refused.code == "NoSuchKey":
                return None
            raise

    def create(self, path: str, body: bytes) -> bool:
        return self._put(path, body, IfNoneMatch="*")

    def replace(self, path: str, body: bytes, tag: str) -> bool:
        return self._put(path, body, IfMatch=tag)

    def delete(self, path: str) -> None:
        with _os_errors():
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + path)

    def _put(self, path: str, body: bytes, **condition: str) -> bool:
        for conflict in itertools.count(1):
            try:
                with _os_errors():
                    self._client.put_object(Bucket=self._bucket, Key=self._prefix + path, Body=body, **condition)
                return True
            except _RefusedError as refused:
                if refused.status == 412 or refused.code == "NoSuchKey":
                    break
                if refused.status != 409 or conflict == CONFLICTS:
                    raise
            time.sleep(0.05)
        # Refused; or written, the reply lost, and refused when the client asked again: then this body stands there.
        found = self.read(path)
        return found is not None and found[0] == body


class _RefusedError(OSError):
    """A server's answer that is an error, in the words of pyarrow's S3 client, which `explain` knows."""

    def __init__(self, status: int, code: str, operation: str, message: str) -> None:
        super().__init__(f"AWS Error {code} (HTTP status {status}) during {operation} operation: {message}")
        self.status, self.code = status, code


@contextmanager
def _os_errors() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        said = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        raise _RefusedError(status, said.get("Code", ""), error.operation_name, said.get("Message", "")) from error
    except BotoCoreError as error:
        raise ConnectionError(f"AWS Error NETWORK_CONNECTION during a conditional request. Details: {error}") from error


class FolderConditional:
    """Below a folder; the tag of a file is its sha256.

    Holds on one machine, and on a network filesystem that carries locks (NFS 4).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, path: str) -> tuple[bytes, str] | None:
        try:
            body = (self._folder / path).read_bytes()
        except FileNotFoundError:
            return None
        return body, _tag(body)

    def create(self, path: str, body: bytes) -> bool:
        return self._swap(path, body, lambda old: old is None)

    def replace(self, path: str, body: bytes, tag: str) -> bool:
        return self._swap(path, body, lambda old: old is not None and old[1] == tag)

    def _swap(self, path: str, body: bytes, may: Callable[[tuple[bytes, str] | None], bool]) -> bool:
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock")):
            if not may(self.read(path)):
                return False
            staging = target.with_name(f".{target.name}.part-{uuid.uuid4().hex[:8]}")
            try:
                with staging.open("xb") as stream:
                    stream.write(body)
                    stream.flush()
                    os.fsync(stream.fileno())
                staging.replace(target)
            except BaseException:
                staging.unlink(missing_ok=True)
                raise
            _flush_folder(target.parent)
        return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock file stays: to delete it would let two processes lock two files of one name."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        until = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Only a suspended process holds it longer than a moment.
                if time.monotonic() > until:
                    raise TimeoutError(f"{path} stays locked by another process; is one suspended?") from None
                time.sleep(0.005)
        yield
    finally:
        os.close(handle)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _probe(bucket: BucketConditional, url: str) -> None:
    """Some servers accept the headers and ignore them: then every contender would believe that it won."""
    path = f".probe-{uuid.uuid4().hex}"
    bodies = [uuid.uuid4().bytes for _ in range(4)]
    kept = bucket.create(path, bodies[0])
    try:
        kept &= not bucket.create(path, bodies[1])
        kept &= not bucket.replace(path, bodies[2], f'"{uuid.uuid4().hex}"')
        found = bucket.read(path)
        kept &= found is not None and found[0] == bodies[0] and bucket.replace(path, bodies[3], found[1])
    finally:
        bucket.delete(path)
    if not kept:
        raise StorageError(
            f"the object storage of {redact(url)} ignores conditional writes (If-None-Match, If-Match), so two launches"
            " of one run could not tell that they are two: use one that keeps them (AWS S3, SeaweedFS from 4.40)"
        )
