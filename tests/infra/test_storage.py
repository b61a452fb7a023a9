"""One filesystem object for S3, folders and the web, and its errors in words; all on real servers and real files."""

from __future__ import annotations

import functools
import http.server
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from infra.processes import free_ports
from infra.storage import (
    StorageError,
    cache_folder,
    check_storage,
    default_store,
    explain,
    open_source,
    open_storage,
    redact,
)
from pipelines.objects import children, exists, read_object, write_object


def test_s3_roundtrip_also_after_pickling(s3_store):
    url, fs = s3_store
    write_object(fs, "a/b/key", b"figment")
    other = pickle.loads(pickle.dumps(fs))
    assert read_object(other, "a/b/key") == b"figment"
    assert children(other, "a") == ["b"]
    source, path = open_source(f"{url}/a/b/key")
    assert read_object(source, path) == b"figment"
    assert not exists(open_storage(f"{url}/elsewhere"), "a/b/key")


def test_folder_roundtrip_as_path_and_as_url(tmp_path):
    folder = tmp_path / "with space"
    write_object(open_storage(str(folder)), "x/key", b"1")
    assert read_object(open_storage(folder.as_uri()), "x/key") == b"1"
    assert (folder / "x" / "key").read_bytes() == b"1"
    source, path = open_source((folder / "x" / "key").as_uri())
    assert read_object(source, path) == b"1"


def test_check_storage_leaves_nothing(s3_store, store):
    for fs in (s3_store[1], store):
        check_storage(fs)
        assert fs.get_file_info(pafs.FileSelector("", recursive=True, allow_not_found=True)) == []


def test_check_storage_notices_a_storage_that_forgets(store):
    class Forgetful(pafs.FSSpecHandler):
        def __init__(self):
            from fsspec.implementations.memory import MemoryFileSystem

            super().__init__(MemoryFileSystem())

        def get_file_info_selector(self, selector):
            return []

    with pytest.raises(StorageError, match="does not list what was just written"):
        check_storage(pafs.PyFileSystem(Forgetful()))


@pytest.mark.parametrize(
    ("variable", "wrong"), [("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_SECRET_ACCESS_KEY", "wr0ng-key")]
)
def test_wrong_credentials(s3_store, monkeypatch, variable, wrong):
    url, fs = s3_store
    write_object(fs, "key", b"")
    true_secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv(variable, wrong)
    with pytest.raises(StorageError, match=r"refuses these credentials .*check AWS_ACCESS_KEY_ID") as caught:
        open_storage(url)
    source, path = open_source(f"{url}/new")
    with pytest.raises(OSError, match="AWS Error") as refused:
        write_object(source, path, b"x")
    for said in (str(caught.value), explain(refused.value, url)):
        assert "refuses these credentials" in said
        assert wrong not in said
        assert true_secret not in said


def test_unreachable_endpoint(monkeypatch):
    (port,) = free_ports(["nobody"]).values()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    with pytest.raises(StorageError, match=rf"cannot reach .*127\.0\.0\.1:{port}.*AWS_ENDPOINT_URL_S3"):
        open_storage("s3://figment/x")


def test_missing_bucket_is_named_and_not_made(s3_endpoint):
    for _ in range(2):
        with pytest.raises(StorageError, match=r"no bucket 'figmnet' .*aws s3 mb s3://figmnet"):
            open_storage("s3://figmnet/x")
    source, path = open_source("s3://figmnet/x")
    with pytest.raises(OSError, match="NO_SUCH_BUCKET") as caught:
        write_object(source, path, b"x")
    assert "no bucket 'figmnet'" in explain(caught.value, "s3://figmnet/x")


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://", "hdfs://host/x", "https://host/x"])
def test_not_a_storage(url):
    with pytest.raises(StorageError, match="s3://bucket/prefix"):
        open_storage(url)


def test_not_a_source():
    with pytest.raises(StorageError, match="cannot read ftp://host/x: sources are"):
        open_source("ftp://me:secret@host/x")


def test_endpoint_that_is_no_endpoint(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://host/bucket")
    with pytest.raises(StorageError, match="must look like https://host:port"):
        open_storage("s3://figment")


def test_general_endpoint_variable_counts_too(s3_store, monkeypatch):
    url, _ = s3_store
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL_S3"])
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    check_storage(open_storage(url))


def test_no_space_left(tmp_path):
    fs = open_storage(str(tmp_path))
    (tmp_path / "shard").symlink_to("/dev/full")  # takes no byte, like a full disk
    with pytest.raises(OSError, match="No space left") as caught, fs.open_output_stream("shard") as stream:
        stream.write(b"x" * 2**20)
    assert explain(caught.value, str(tmp_path)).startswith("no space left on device while writing to")


def test_file_size_limit(tmp_path):
    code = (
        "import resource, sys\n"
        "from infra.storage import explain, open_storage; from pipelines.objects import write_object\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_object(open_storage(sys.argv[1]), 'shard', b'x' * 2**20)\n"
        "except OSError as error: print(explain(error, sys.argv[1]))\n"
    )
    assert "grew over the limit of file sizes" in _python(code, tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing half-written stays


def test_folder_of_someone_else(tmp_path):
    code = (
        "import os, sys; from infra.storage import StorageError, open_storage\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: open_storage(sys.argv[1] + '/store')\n"
        "except StorageError as error: print(error)\n"
    )
    tmp_path.chmod(0o500)
    try:
        assert _python(code, tmp_path).startswith(f"permission denied at {tmp_path}/store")
    finally:
        tmp_path.chmod(0o700)


def test_the_home_folder_of_nobody(monkeypatch):
    for use in (open_storage, open_source):
        with pytest.raises(StorageError, match="there is no user of that name"):
            use("~no-such-user/store")
    monkeypatch.setenv("FIGMENT_CACHE", "~no-such-user/cache")
    with pytest.raises(StorageError, match="there is no user of that name"):
        cache_folder()


def test_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "store").write_text("a file")
    for path in ("store", "store/deeper"):
        with pytest.raises(StorageError, match="a file stands where a folder is needed"):
            open_storage(str(tmp_path / path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body.", "set AWS_REGION"),
        ("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate.", "overloaded"),
        (
            "AWS Error EXPIRED_TOKEN during ListObjectsV2 operation: expired",
            "refuses these credentials (EXPIRED_TOKEN)",
        ),
        ("curlCode: 28, Timeout was reached", "cannot reach the object storage"),
        ("Connection refused", "a connection failed (Connection refused): `make status`"),
        ("something never seen", "s3://bucket/x: something never seen"),
    ],
)
def test_words_for_other_errors(text, said):
    assert said in explain(OSError(text), "s3://bucket/x")


def test_unknown_error_says_where_it_came_up():
    try:
        raise OSError("odd")
    except OSError as error:
        assert "(at test_storage.py:" in explain(error, "s3://bucket")


def test_redact(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FQoGZXIvYXdz")
    assert redact("https://u:p@host/a?X-Amz-Signature=1 and FQoGZXIvYXdz") == "https://host/a and ***"


def test_default_store(monkeypatch):
    assert default_store() is None
    monkeypatch.setenv("FIGMENT_STORE", "s3://figment")
    assert default_store() == "s3://figment"


@pytest.fixture
def web(tmp_path):
    """(url, folder) of a web server; `/private/…` is refused."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/private"):
                self.send_error(403)
            else:
                super().do_GET()

        do_HEAD = do_GET

        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path
    server.shutdown()
    server.server_close()


def test_source_in_the_web(web):
    url, folder = web
    body = os.urandom(3_000_000)
    (folder / "archive.tar").write_bytes(body)
    fs, path = open_source(f"{url}/archive.tar")
    fs = pickle.loads(pickle.dumps(fs))
    assert fs.get_file_info(path).size == len(body)
    assert read_object(fs, path) == body


def test_source_in_the_web_that_is_not_there(web):
    url, _ = web
    (port,) = free_ports(["nobody"]).values()
    for address, said in [
        (f"{url}/nothing.tar", "answers 404"),
        (f"{url}/private/x.tar?signature=abc", "answers 403"),
        (f"http://me:pass@127.0.0.1:{port}/x.tar", "cannot reach"),
    ]:
        with pytest.raises(StorageError, match=said) as caught:
            open_source(address)
        assert "abc" not in str(caught.value)
        assert "pass" not in str(caught.value)


def _python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
