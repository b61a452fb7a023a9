"""One filesystem object for everything that Figment keeps: S3 (AWS, GCS-S3, MinIO, SeaweedFS) or a plain folder.

Endpoint, region and credentials come from the standard environment (`AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`,
`AWS_REGION` or `AWS_DEFAULT_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`), else from the
AWS default chain: profile, instance role. What is opened here pickles, so a job opens it once and Ray carries it to the
workers as a value.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pyarrow import fs as pafs

STORE_VARIABLE = "FIGMENT_STORE"

# A closed port is refused at once; with back-off, four attempts end after about 5 s, and one that swallows packets
# ends after about 20 s. More attempts would only make a typing error in the endpoint slower to see.
CONNECT_TIMEOUT_S = 4.0
REQUEST_TIMEOUT_S = 30.0
ATTEMPTS = 4


class StorageError(Exception):
    """One sentence that says what is wrong with the storage, where, and what to do. Never holds a secret."""


def default_store() -> str | None:
    """The storage url of the environment, `FIGMENT_STORE`; None when it is not set."""
    return os.environ.get(STORE_VARIABLE) or None


def open_storage(url: str) -> pafs.FileSystem:
    """A filesystem rooted at `url`: `s3://bucket/prefix`, `file:///folder`, or a plain folder (made when missing).

    Raises `StorageError` when the bucket is not there, the endpoint cannot be reached or refuses the credentials, or
    the folder cannot be made.
    """
    parts = urlsplit(url)
    try:
        if parts.scheme == "s3":
            return _open_bucket(url, parts.netloc, parts.path)
        if parts.scheme in ("", "file"):
            folder = Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute()
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
        path = Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute()
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


def _open_bucket(url: str, bucket: str, prefix: str) -> pafs.FileSystem:
    if not bucket:
        raise StorageError(f"{url} names no bucket: use s3://bucket/prefix")
    s3 = _s3()
    # Reading from a bucket that is not there looks like an empty store, so the bucket is asked for first.
    if s3.get_file_info(bucket).type == pafs.FileType.NotFound:
        raise StorageError(_no_bucket(bucket))
    return pafs.SubTreeFileSystem(f"{bucket}{prefix}".rstrip("/"), s3)


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


def s3_endpoint() -> str | None:
    """The endpoint of the environment; None means AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


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


# --- errors in words ------------------------------------------------------------------------------------------------

_UNREACHABLE = re.compile(
    r"NETWORK_CONNECTION|curlCode|[Cc]ould not resolve|Connection refused|timed? ?out|Connect call failed"
    r"|Cannot connect"
)
_REFUSED = re.compile(
    r"INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|ACCESS_DENIED|AccessDenied"
    r"|EXPIRED_TOKEN|ExpiredToken|INVALID_CLIENT_TOKEN|MISSING_AUTHENTICATION|HTTP status 40[13]"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '[^']*' not found")
_WRONG_REGION = re.compile(r"HTTP status 301|PERMANENT_REDIRECT|PermanentRedirect|AuthorizationHeaderMalformed")
_SERVER = re.compile(r"INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|SlowDown|HTTP status 50\d")


def explain(error: OSError, url: str) -> str:
    """One sentence for an error of storage or network: what, where, what to do. Holds no secret."""
    text = str(error)
    for recognise in (_explain_errno, _explain_s3):
        sentence = recognise(error, text, url)
        if sentence:
            return redact(sentence)
    # Not one that we know: at least say where in our code it came up.
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    place = f" (at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})" if frame else ""
    return redact(f"{url}: {' '.join(text.split()) or type(error).__name__}{place}")


def _explain_errno(error: OSError, text: str, url: str) -> str | None:
    where = f"{url} ({error.filename})" if error.filename and str(error.filename) not in url else url
    code = error.errno
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text or "Disk quota exceeded" in text:
        return f"no space left on device while writing to {where}: free some space or use another storage (--store)"
    if code == errno.EFBIG:
        return f"a file of {where} grew over the limit of file sizes: raise it (ulimit -f) or use another storage"
    if code in (errno.EACCES, errno.EPERM):
        return f"permission denied at {where}: use a place that this user may read and write"
    if code == errno.EROFS:
        return f"{where} is on a read-only filesystem: use a place that can be written"
    if code in (errno.ENOTDIR, errno.EEXIST):
        return f"{where}: a file stands where a folder is needed; use another path"
    if code == errno.ENOENT or isinstance(error, FileNotFoundError):
        missing = re.search(r"Path does not exist '([^']*)'", text) or re.search(r"'([^']*)'", text)
        name = missing.group(1) if missing else ""
        beside = f" ({name})" if name and name not in url else ""
        return f"{url}{beside} does not exist: check the path"
    return None


def _explain_s3(error: OSError, text: str, url: str) -> str | None:
    at = s3_endpoint() or "AWS S3"
    if isinstance(error, ConnectionError | TimeoutError) or _UNREACHABLE.search(text):
        reason = re.search(r"Details: (.*)", text) or re.search(r"\] (.*)", text)
        why = (reason.group(1) if reason else text).strip().rstrip(".")
        if url.startswith(("http://", "https://")):
            return f"cannot reach {url} ({why}): check the address and the network"
        if "AWS Error" not in text and "curlCode" not in text:
            return f"a connection failed ({why}): `make status` says whether the local servers run"
        return (
            f"cannot reach the object storage of {url} at {at} ({why}):"
            " check AWS_ENDPOINT_URL_S3 and the network; `make stack` starts a local one"
        )
    if _REFUSED.search(text):
        found = re.search(r"AWS Error (?:\[?code )?([A-Z_a-z0-9]+)", text)
        return (
            f"the object storage of {url} at {at} refuses these credentials ({found.group(1) if found else '403'}):"
            " check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may read, write, list and delete there"
        )
    if _NO_BUCKET.search(text):
        return _no_bucket(urlsplit(url).netloc)
    if _WRONG_REGION.search(text):
        return f"the bucket of {url} is in another region than asked: set AWS_REGION to the bucket's own"
    if _SERVER.search(text):
        return f"the object storage of {url} at {at} failed (its disk full? overloaded?), look at its log: {text}"
    return None


def _no_bucket(bucket: str) -> str:
    return (
        f"there is no bucket {bucket!r} at {s3_endpoint() or 'AWS S3'}:"
        f" check its name and AWS_ENDPOINT_URL_S3, or create it (aws s3 mb s3://{bucket})"
    )


def redact(text: str) -> str:
    """`text` without logins and query strings of urls (signatures live there) and without this process's secrets."""
    text = re.sub(r"(\w+://)[^/\s@]*@", r"\1", text)
    text = re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
        secret = os.environ.get(name)
        if secret and len(secret) >= 8:  # a shorter one would tear words apart, and is no secret
            text = text.replace(secret, "***")
    return text
