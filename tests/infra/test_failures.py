"""Whether waiting helps, decided on the texts that real storages and clients write."""

from __future__ import annotations

import errno
import pickle

import pytest

from infra.failures import is_transient, reason
from infra.patient import StorageGoneError

AWS = "When uploading part for key 'k' in bucket 'b': AWS Error "


@pytest.mark.parametrize(
    "error",
    [
        OSError(AWS + "NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect to server"),
        OSError(AWS + "NETWORK_CONNECTION during GetObject operation: curlCode: 18, Transferred a partial file"),
        OSError(AWS + "INTERNAL_FAILURE during UploadPart operation: We encountered an internal error."),
        OSError(AWS + "UNKNOWN (HTTP status 500) during HeadObject operation: No response body."),
        OSError(AWS + "UNKNOWN (HTTP status 503) during HeadObject operation: No response body."),
        OSError(AWS + "SLOW_DOWN during PutObject operation: Please reduce your request rate."),
        OSError(AWS + "UNKNOWN (HTTP status 429) during HeadObject operation: No response body."),
        OSError(AWS + "REQUEST_TIMEOUT during PutObject operation: Your socket connection was not read from in time."),
        OSError(AWS + "NO_SUCH_UPLOAD during UploadPart operation: The specified upload does not exist."),
        OSError(
            AWS + "UNKNOWN (HTTP status 400) during PutObject operation: Unable to parse ExceptionName: IncompleteBody"
        ),
        OSError("something never seen"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("timed out"),
    ],
)
def test_waiting_helps(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(AWS + "ACCESS_DENIED during PutObject operation: Access Denied"),
        OSError(AWS + "INVALID_ACCESS_KEY_ID (HTTP status 403) during PutObject operation: unknown"),
        OSError(AWS + "SIGNATURE_DOES_NOT_MATCH during PutObject operation: mismatch"),
        OSError(AWS + "EXPIRED_TOKEN during ListObjectsV2 operation: expired"),
        OSError(AWS + "NO_SUCH_BUCKET during CreateMultipartUpload operation: The specified bucket does not exist"),
        OSError(AWS + "NO_SUCH_KEY during CopyObject operation: The specified key does not exist."),
        OSError(AWS + "UNKNOWN (HTTP status 400) during HeadObject operation: No response body."),
        OSError(AWS + "UNKNOWN (HTTP status 301) during HeadObject operation: No response body."),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError(errno.ENOENT, "no such object"),
        FileNotFoundError("Path does not exist 'b/k'"),
    ],
)
def test_waiting_does_not_help(error):
    assert not is_transient(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            AWS + "NETWORK_CONNECTION during X operation: curlCode: 7, y; Details: Failed to connect.",
            "Failed to connect",
        ),
        (AWS + "UNKNOWN (HTTP status 500) during HeadObject operation: No response body.", "HTTP status 500"),
        (AWS + "SLOW_DOWN during PutObject operation: Please reduce", "SLOW_DOWN"),
        ("odd", "odd"),
    ],
)
def test_reason(text, said):
    assert reason(OSError(text)) == said


def test_the_name_of_an_object_does_not_decide_whether_to_wait():
    text = "When reading information for key '{}' in bucket 'b': AWS Error NETWORK_CONNECTION HeadObject: refused"
    assert is_transient(OSError(text.format("runs/x/run.json")))
    assert is_transient(OSError(text.format("runs/INVALID_labels/NO_SUCH_KEY/run.json")))


def test_what_was_waited_for_in_vain_says_so_on_other_nodes_too():
    gone = pickle.loads(pickle.dumps(StorageGoneError("refused; waited 7 s for it", 7.0)))
    assert isinstance(gone, OSError)
    assert (str(gone), gone.waited_s) == ("refused; waited 7 s for it", 7.0)
