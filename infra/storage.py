"""One filesystem object for everything that Figment keeps: S3 (AWS, GCS-S3, MinIO, SeaweedFS) or a plain folder.

Endpoint, region and credentials come from the standard environment (`AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`,
`AWS_REGION` or `AWS_DEFAULT_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`), else from the
AWS default chain: profile, instance role. What is opened here pickles, so a job opens it once and Ray carries it to the
workers as a value.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pyarrow import fs as pafs

from infra.failures import StorageError, explain, no_bucket, redact, s3_endpoint
from infra.patient import patient

__all__ = ["StorageError", "explain", "redact", "s3_endpoint"]  # of `infra.failures`, for who opens a storage

STORE_VARIABLE = "FIGMENT_STORE"
PATIENCE_VARIABLE = "FIGMENT_STORAGE_PATIENCE_S"
PATIENCE_S = 600.0

# A closed port is refused at once; with back-off, four attempts end after about 5 s, and one that swallows packets
# ends after about 20 s. More attempts would only make a typing error in the endpoint slower to see.
CONNECT_TIMEOUT_S = 4.0
REQUEST_TIMEOUT_S = 30.0
ATTEMPTS = 4


def default_store() -> str | None:
    """The storage url of the environment, `FIGMENT_STORE`; None when it is not set."""
    return os.environ.get(STORE_VARIABLE) or None


def cache_folder() -> Path:
    """For what can be downloaded again: `FIGMENT_CACHE`, else `figment` in the user's cache folder."""
    chosen = os.environ.get("FIGMENT_CACHE")
    if chosen:
        return local_path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")  # which counts only when it is absolute
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "figment"


def local_path(text: str) -> Path:
    """The absolute path; `StorageError` for a `~name` of nobody."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise StorageError(f"{text} is in no one's home folder: there is no user of that name here") from error


def default_patience_s() -> float:
    """Seconds from the environment, `FIGMENT_STORAGE_PATIENCE_S`; ten minutes when it is not set."""
    text = os.environ.get(PATIENCE_VARIABLE) or str(PATIENCE_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise StorageError(f"{PATIENCE_VARIABLE} is {text!r}: it must be a number of seconds, 0 or more")
    return seconds


def open_storage(url: str, patience_s: float | None = None) -> pafs.FileSystem:
    """A filesystem rooted at `url`: `s3://bucket/prefix`, `file:///folder`, or a plain folder (made when missing).

    On S3 every later operation waits `patience_s` for a storage that fails (`infra.patient`; default: the
    environment's). The first question is not patient: a wrong endpoint, key or bucket is seen at once.

    Raises `StorageError` when the bucket is not there, the endpoint cannot be reached or refuses the credentials, or
    the folder cannot be made.
    """
    parts = urlsplit(url)
    try:
        if parts.scheme == "s3":
            return _open_bucket(
                url, parts.netloc, parts.path, default_patience_s() if patience_s is None else patience_s
            )
        if parts.scheme in ("", "file"):
            folder = local_path(unquote(parts.path) if parts.scheme else url)
            folder.mkdir(parents=True, exist_ok=True)
            return pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())
    except OSError as error:
        raise StorageError(explain(error, url)) from error
    raise StorageError(f"{redact(url)} is not a storage url: use s3://bucket/prefix, file:///folder or a plain folder")


def open_source(url: str) -> tuple[pafs.FileSystem, str]:
    """(filesystem, path in it) of something to read: a local path, `file://`, `s3://`, `https://` or `http://`.

    Raises `StorageError` for any other scheme and for an address in the web that does not answer. Whether a path in a
    filesystem exists is for the reader to find out.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        return _s3(), f"{parts.netloc}{parts.path}".rstrip("/")
    if parts.scheme in ("http", "https"):
        return _http(url), url
    if parts.scheme in ("", "file"):
        path = local_path(unquote(parts.path) if parts.scheme else url)
        return pafs.LocalFileSystem(), str(path)
    raise StorageError(f"cannot read {redact(url)}: sources are local paths, file://, s3://, https:// and http://")


def check_storage(fs: pafs.FileSystem) -> None:
    """Write, read, list and delete a probe; an `OSError` of the storage, or `StorageError` when it does not keep.

    S3 accepts or refuses a key only when an upload ends, so nothing short of a real write tells.
    """
    folder = f".probe-{uuid.uuid4().hex}"
    path, body = f"{folder}/key", uuid.uuid4().bytes
    fs.create_dir(folder, recursive=True)
    try:
        with fs.open_output_stream(path) as stream:
            stream.write(body)
        with fs.open_input_stream(path) as stream:
            if bytes(stream.read()) != body:
                raise StorageError("the storage gave back other bytes than were written to it")
        names = [info.base_name for info in fs.get_file_info(pafs.FileSelector(folder))]
        if names != ["key"]:
            raise StorageError(f"the storage does not list what was just written to it (it lists {names})")
    finally:
        fs.delete_dir(folder)
    if fs.get_file_info(path).type != pafs.FileType.NotFound:
        raise StorageError("the storage still has an object after its deletion")


def _open_bucket(url: str, bucket: str, prefix: str, patience_s: float) -> pafs.FileSystem:
    if not bucket:
        raise StorageError(f"{url} names no bucket: use s3://bucket/prefix")
    s3 = _s3()
    # Reading from a bucket that is not there looks like an empty store, so the bucket is asked for first.
    if s3.get_file_info(bucket).type == pafs.FileType.NotFound:
        raise StorageError(no_bucket(bucket))
    return pafs.SubTreeFileSystem(f"{bucket}{prefix}".rstrip("/"), patient(s3, patience_s, redact(url)))


def _s3() -> pafs.S3FileSystem:
    options = _from_environment()
    endpoint = options.pop("endpoint", None)
    if endpoint:
        scheme, _, address = endpoint.partition("://")
        options |= {"endpoint_override": address, "scheme": scheme}
    return pafs.S3FileSystem(
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        **options,
    )


def s3_client_options() -> dict[str, str]:
    """The same endpoint, region and credentials in the words of a boto3 client."""
    names = {
        "endpoint": "endpoint_url",
        "region": "region_name",
        "access_key": "aws_access_key_id",
        "secret_key": "aws_secret_access_key",
        "session_token": "aws_session_token",
    }
    return {names[name]: value for name, value in _from_environment().items()}


def _from_environment() -> dict[str, str]:
    env = os.environ
    endpoint = s3_endpoint()
    options: dict[str, str] = {}
    if endpoint:
        parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        if not parts.netloc or parts.path.strip("/"):
            raise StorageError(f"the S3 endpoint {redact(endpoint)!r} must look like https://host:port, without a path")
        options["endpoint"] = f"{parts.scheme}://{parts.netloc}"
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    if region:
        options["region"] = region
    if env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY"):
        # Passed on, so that a worker on a node without these variables can use what its driver opened.
        options["access_key"] = env["AWS_ACCESS_KEY_ID"]
        options["secret_key"] = env["AWS_SECRET_ACCESS_KEY"]
        if env.get("AWS_SESSION_TOKEN"):
            options["session_token"] = env["AWS_SESSION_TOKEN"]
    return options


def _http(url: str) -> pafs.FileSystem:
    # Imported here: only an ingest from the web pays for aiohttp.
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=60)
    web = HTTPFileSystem(client_kwargs={"timeout": timeout, "trust_env": True})
    try:
        # Later, through pyarrow, a refused connection and a missing file look the same.
        web.info(url)
    except OSError as error:  # fsspec's FileNotFoundError, whatever went wrong; the reason is its cause
        cause = error.__cause__
        if isinstance(cause, aiohttp.ClientResponseError):
            raise StorageError(f"{redact(url)} answers {cause.status} {cause.message}: check the address") from error
        raise StorageError(explain(cause if isinstance(cause, OSError) else error, url)) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(web))
