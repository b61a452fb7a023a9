"""The errors of storage and network: what they mean in words, and whether waiting helps."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from urllib.parse import urlsplit


class StorageError(Exception):
    """One sentence that says what is wrong with the storage, where, and what to do. Never holds a secret."""


def s3_endpoint() -> str | None:
    """The endpoint of the environment; None means AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


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


# Refusals that a new try of the whole operation mends: what was sent did not arrive whole, or two met.
_ANOTHER_TRY = re.compile(
    r"NO_SUCH_UPLOAD|NoSuchUpload|InvalidPart|IncompleteBody|BadDigest|RequestTimeout|OperationAborted"
    r"|ConditionalRequestConflict|SlowDown|Throttl|HTTP status (?:408|409|425|429)"
)
_BAD_REQUEST = re.compile(
    r"NO_SUCH_KEY|NoSuchKey|RESOURCE_NOT_FOUND|MALFORMED|VALIDATION|INVALID_|MISSING_|UNRECOGNIZED_CLIENT|OPT_IN_REQUIRED"
    r"|INCOMPLETE_SIGNATURE|HTTP status [34]\d\d"
)
_PERMANENT_ERRNO = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR),
    *(errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EXDEV),
}


def is_transient(error: OSError) -> bool:
    """Whether the same operation may succeed later without anybody changing anything. What is unknown may."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    text = re.sub(r"'[^']*'", "''", str(error))  # names of objects may hold any word
    if isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | NotADirectoryError | IsADirectoryError
    ):
        return False
    if error.errno in _PERMANENT_ERRNO or "No space left on device" in text or "Disk quota exceeded" in text:
        return False
    if _ANOTHER_TRY.search(text):
        return True
    return not any(known.search(text) for known in (_REFUSED, _NO_BUCKET, _WRONG_REGION, _BAD_REQUEST))


def is_absence(error: OSError) -> bool:
    """Whether there is no such object; deleted between two requests, S3's client says so in other words."""
    return isinstance(error, FileNotFoundError) or bool(
        re.search("NO_SUCH_KEY|NoSuchKey|RESOURCE_NOT_FOUND", str(error))
    )


def reason(error: OSError) -> str:
    """Why, in a few words: `Could not connect to server`, `SLOW_DOWN`. Holds no secret."""
    text = " ".join(str(error).split())
    for pattern in (r"Details: (.*)", r"AWS Error UNKNOWN \((HTTP status \d+)\)", r"AWS Error ([A-Z_a-z0-9]+)"):
        found = re.search(pattern, text)
        if found:
            return redact(found[1].rstrip("."))
    return redact(text) or type(error).__name__


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
        return no_bucket(urlsplit(url).netloc)
    if _WRONG_REGION.search(text):
        return f"the bucket of {url} is in another region than asked: set AWS_REGION to the bucket's own"
    if _SERVER.search(text):
        return f"the object storage of {url} at {at} failed (its disk full? overloaded?), look at its log: {text}"
    return None


def no_bucket(bucket: str) -> str:
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
