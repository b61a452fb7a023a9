"""Downloads from a real web server that cuts, stalls, redirects, refuses, lies and changes its mind."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.data.download import Patience, PublishedFile, fetch
from pipelines.errors import FigmentError
from tests.pipelines.data.web import Answer, Handler, Web

DATA = bytes(range(256)) * 2000  # 512,000 bytes
OTHER = DATA[::-1]
HALF = len(DATA) // 2
SOON = Patience(stall_s=60, tries=3, pause_s=0.001)
STALLED = Patience(stall_s=0.3, tries=30, pause_s=0.001)  # more tries than a busy machine can need
ROOT = Path(__file__).parents[3]


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        server.has("/whole", lambda handler: handler.give_rest(DATA))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.end.set()
        server.shutdown()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "file.bin"


def published(*urls: str, data: bytes = DATA) -> PublishedFile:
    return PublishedFile("file.bin", len(data), hashlib.md5(data).hexdigest(), urls)


def bring(target: Path, *urls: str, patience: Patience = SOON) -> list[str]:
    """Downloads DATA to `target` and returns what was said meanwhile."""
    said: list[str] = []
    fetch(published(*urls), target, patience=patience, say=said.append)
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return said


def refused(target: Path, *urls: str, patience: Patience = SOON) -> str:
    with pytest.raises(FigmentError) as error:
        fetch(published(*urls), target, patience=patience)
    assert not target.exists()
    return str(error.value)


def part(target: Path) -> Path:
    return target.with_name("file.bin.part")


def cut(upto: int, **headers: str) -> Answer:
    return lambda handler: handler.give_rest(DATA, upto, **headers)


def status(code: int, **headers: str) -> Answer:
    return lambda handler: handler.give(code, b"no", **headers)


def test_a_whole_file_is_brought_once_and_told_of(web: Web, target: Path) -> None:
    got: list[int] = []
    fetch(published(web.url("/whole")), target, on_progress=got.append)
    assert target.read_bytes() == DATA and got == sorted(got) and got[-1] == len(DATA)
    fetch(published(web.url("/whole")), target)
    assert len(web.asked) == 1
    target.write_bytes(OTHER)  # damaged since: the same length
    assert bring(target, web.url("/whole")) == []
    assert len(web.asked) == 2


def test_a_cut_file_goes_on_where_it_broke_off(web: Web, target: Path) -> None:
    url = web.has("/x", cut(HALF, ETag='"1"'), cut(HALF + 9, ETag='"1"'), cut(len(DATA), ETag='"1"'))
    said = bring(target, url)
    assert web.ranges() == [(None, None), (f"bytes={HALF}-", '"1"'), (f"bytes={HALF + 9}-", '"1"')]
    assert said[0] == f"{url} broke off after 256,000 of 512,000 bytes; try 2 of 3 in 0.001 s"


def test_weak_names_of_versions_are_not_compared_but_dates_are(web: Web, target: Path) -> None:
    date = "Thu, 01 Jan 2026 00:00:00 GMT"
    bring(target, web.has("/x", cut(HALF, ETag='W/"1"', Last_Modified=date), cut(len(DATA))))
    assert web.ranges()[1] == (f"bytes={HALF}-", date)


def test_a_later_call_goes_on_with_what_an_earlier_one_left(web: Web, target: Path) -> None:
    message = refused(target, web.has("/x", cut(HALF), status(404)))
    assert message == f"file.bin cannot be downloaded: {web.url('/x')} answers 404 Not Found"
    assert part(target).read_bytes() == DATA[:HALF]
    bring(target, web.url("/whole"))
    assert web.ranges()[-1] == (f"bytes={HALF}-", None)


def test_a_whole_part_needs_no_server(web: Web, target: Path) -> None:
    target.parent.mkdir()
    part(target).write_bytes(DATA)
    bring(target, web.url("/whole"))
    assert web.asked == []


@pytest.mark.parametrize("left", [OTHER[:HALF], OTHER, DATA + b"more"], ids=["half", "whole", "longer"])
def test_a_part_of_another_file_is_thrown_away(web: Web, target: Path, left: bytes) -> None:
    target.parent.mkdir()
    part(target).write_bytes(left)
    bring(target, web.url("/whole"))
    assert web.ranges()[-1] == (None, None)


def test_a_file_that_changed_meanwhile_begins_anew(web: Web, target: Path) -> None:
    def by_version(handler: Handler) -> None:
        assert handler.headers["If-Range"] == '"old"'
        handler.give(200, DATA, ETag='"new"')

    bring(target, web.has("/x", lambda h: h.give(200, OTHER[:HALF], Content_Length="512000", ETag='"old"'), by_version))
    # A server without names of versions: the checksum finds it out.
    target.unlink()
    web.asked.clear()
    said = bring(target, web.has("/y", lambda h: h.give_rest(OTHER, HALF), lambda h: h.give_rest(DATA)))
    assert web.ranges() == [(None, None), (f"bytes={HALF}-", None), (None, None)]
    assert "continues another file" in said[1]


def test_a_server_that_ignores_ranges_begins_anew(web: Web, target: Path) -> None:
    bring(target, web.has("/x", cut(HALF), lambda h: h.give(200, DATA)))
    assert web.ranges()[1] == (f"bytes={HALF}-", None)


@pytest.mark.parametrize(
    "wrong",
    [
        status(416, Content_Range="bytes */10"),
        lambda h: h.give(206, DATA[9:], Content_Range=f"bytes 9-511999/{len(DATA)}"),
        lambda h: h.give(206, DATA[9:]),
    ],
    ids=["416", "another part", "no Content-Range"],
)
def test_a_wrong_answer_to_a_range_begins_anew(web: Web, target: Path, wrong: Answer) -> None:
    bring(target, web.has("/x", cut(HALF), wrong, cut(len(DATA))))
    assert [asked for asked, _ in web.ranges()] == [None, f"bytes={HALF}-", None]


def test_a_server_that_never_gets_further_is_given_up(web: Web, target: Path) -> None:
    same_half = web.has("/x", lambda h: h.give(200, DATA[:HALF], Content_Length=str(len(DATA))))
    message = refused(target, same_half)
    assert message.endswith("broke off after 256,000 of 512,000 bytes (tried 3 times)")
    assert len(web.asked) == 3


def test_tries_that_bring_something_are_not_counted(web: Web, target: Path) -> None:
    steps = [cut(at) for at in range(50_000, 500_001, 50_000)]
    bring(target, web.has("/x", *steps, cut(len(DATA))))
    assert len(web.asked) == 11


def test_a_stall_is_given_up_after_the_stated_time(web: Web, target: Path) -> None:
    def stall(handler: Handler) -> None:
        handler.give_rest(DATA, HALF)
        handler.server.end.wait(60)

    said = bring(target, web.has("/x", stall, cut(len(DATA))), patience=STALLED)
    assert "sent nothing for 0.3 s" in said[0] and web.ranges()[-1][0] == f"bytes={HALF}-"
    target.unlink()
    silent = web.has("/y", lambda h: h.server.end.wait(60))
    message = refused(target, silent, patience=Patience(stall_s=0.1, tries=2, pause_s=0.001))
    assert message.endswith("sent nothing for 0.1 s (tried 2 times)")


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_a_server_in_trouble_is_asked_again(web: Web, target: Path, code: int) -> None:
    said = bring(target, web.has("/x", status(code), status(code), cut(len(DATA))))
    assert len(said) == 2 and f"answers {code}" in said[0]


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_refusal_is_final_and_the_next_url_is_asked(web: Web, target: Path, code: int) -> None:
    said = bring(target, web.has("/x", status(code)), web.url("/whole"))
    assert len(said) == 1 and said[0].endswith(f"; asking {web.url('/whole')}")
    assert [path for path, _ in web.asked] == ["/x", "/whole"]


def test_a_mirror_goes_on_with_the_half_of_the_first(web: Web, target: Path) -> None:
    bring(target, web.has("/x", cut(HALF, ETag='"1"'), status(404)), web.url("/whole"))
    assert web.ranges()[-1] == (f"bytes={HALF}-", None)  # the name of a version means nothing to another server


def test_redirections_are_followed(web: Web, target: Path) -> None:
    elsewhere = web.url("/whole", host="localhost")
    web.has("/b", status(302, Location=elsewhere))
    bring(target, web.has("/a", cut(HALF), status(301, Location="/b")))
    assert [path for path, _ in web.asked] == ["/a", "/a", "/b", "/whole"]
    assert web.asked[-1][1]["Range"] == f"bytes={HALF}-" and web.asked[-1][1]["Host"].startswith("localhost")


@pytest.mark.parametrize("where", ["/a", "/b", "ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_redirections_that_lead_nowhere_end(web: Web, target: Path, where: str) -> None:
    web.has("/b", status(302, Location="/a"))
    message = refused(target, web.has("/a", status(302, Location=where)))
    assert web.url("/a") in message and ("redirects in a circle" in message or "unknown url type" in message)


def test_wrong_bytes_are_refused_with_url_and_both_sums(web: Web, target: Path) -> None:
    url = web.has("/x", lambda h: h.give(200, OTHER))
    message = refused(target, url)
    assert url in message and all(hashlib.md5(data).hexdigest() in message for data in (DATA, OTHER))
    assert list(target.parent.iterdir()) == []


def test_lengths_that_are_not_the_published_one_are_refused(web: Web, target: Path) -> None:
    page = web.has("/page", lambda h: h.give(200, b"<html>sign in</html>"))
    said_longer = web.has("/longer", lambda h: h.give(200, DATA, Content_Length="512001"))
    other_rest = web.has("/rest", lambda h: h.give(206, b"x", Content_Range="bytes 256000-256000/256001"))

    def without_end(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(DATA + b"more")

    target.parent.mkdir()
    part(target).write_bytes(DATA[:HALF])
    message = refused(target, page, said_longer, other_rest)
    assert f"{page} has 20 bytes, the published file 512,000" in message
    assert "has 512,001 bytes" in message and "has 256,001 bytes" in message
    assert part(target).read_bytes() == DATA[:HALF]  # it is none of theirs
    assert "goes on after the 512,000 bytes" in refused(target, web.has("/endless", without_end))
    assert list(target.parent.iterdir()) == []


def test_nobody_at_home_is_said(target: Path) -> None:
    message = refused(target, "http://127.0.0.1:9/x", "http://nobody.invalid/y")
    assert "http://127.0.0.1:9/x broke off ([Errno 111] Connection refused) (tried 3 times)" in message
    assert "http://nobody.invalid/y broke off" in message


FETCH = """
import hashlib, sys
from pathlib import Path
from pipelines.data.download import PublishedFile, fetch
from pipelines.errors import FigmentError
url, target, size, md5 = sys.argv[1:]
try:
    fetch(PublishedFile("file.bin", int(size), md5, (url,)), Path(target), say=lambda text: print(text, flush=True))
except FigmentError as error:
    sys.exit(f"error: {error}")
"""


def process(url: str, target: Path, preexec_fn: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url, str(target), str(len(DATA)), hashlib.md5(DATA).hexdigest()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def wait_for_half(running: subprocess.Popen[str], target: Path) -> None:
    while not part(target).exists() or part(target).stat().st_size < HALF:
        assert running.poll() is None
        time.sleep(0.002)


def test_two_at_once_do_not_damage_each_other(web: Web, target: Path) -> None:
    """The second one waits, and is served by what the first one brought."""
    go_on = threading.Event()

    def halt(handler: Handler) -> None:
        handler.give_rest(DATA, HALF)
        go_on.wait(60)
        handler.wfile.write(DATA[HALF:])

    url = web.has("/x", halt)
    first = process(url, target)
    wait_for_half(first, target)
    second = process(url, target)
    assert second.stdout and second.stdout.readline() == "another process is downloading file.bin: waiting for it\n"
    go_on.set()
    for running in (first, second):
        assert running.communicate(timeout=60)[1] == "" and running.returncode == 0
    assert target.read_bytes() == DATA and len(web.asked) == 1
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


def test_a_killed_one_frees_its_lock_and_keeps_its_half(web: Web, target: Path) -> None:
    def halt(handler: Handler) -> None:
        handler.give_rest(DATA, HALF)
        handler.server.end.wait(60)

    first = process(web.has("/x", halt, cut(len(DATA))), target)
    wait_for_half(first, target)
    first.kill()
    first.communicate()
    bring(target, web.url("/x"))
    assert web.ranges()[-1] == (f"bytes={HALF}-", None)


def test_no_room_is_a_sentence_and_the_same_call_goes_on(web: Web, target: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF))

    running = process(web.url("/whole"), target, small_files_only)
    message = running.communicate(timeout=60)[1]
    assert message.startswith(f"error: file.bin cannot be written to {target.parent} (File too large)")
    assert "512,000 bytes" in message and "FIGMENT_CACHE" in message and message.count("\n") == 1
    assert not target.exists() and part(target).read_bytes() == DATA[:HALF]
    bring(target, web.url("/whole"))


def test_a_place_that_cannot_be_written_is_a_sentence(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FigmentError) as error:
        fetch(published(web.url("/whole")), tmp_path / "file" / "file.bin")
    assert f"cannot be written to {tmp_path}/file (" in str(error.value)
    assert web.asked == []


@pytest.mark.parametrize("where", ["http://[::1", "http://[zz]/x", "http://a..b/x", f"http://{'a' * 70}.org/x"])
def test_a_redirection_to_no_address_leads_to_the_next_url(web: Web, target: Path, where: str) -> None:
    said = bring(target, web.has("/away", status(302, Location=where)), web.url("/whole"))
    assert any("/away is no address that can be asked, or leads to none" in line for line in said), said


@pytest.mark.parametrize("length", ["9" * 5000, "5120\u00b2"])
def test_a_length_that_is_no_number_says_nothing(web: Web, target: Path, length: str) -> None:
    bring(target, web.has("/odd", lambda handler: handler.give(200, DATA, Content_Length=length)), web.url("/whole"))


def test_a_malformed_url_leads_to_the_next(web: Web, target: Path) -> None:
    assert "is no address" in bring(target, "http://[zz]/x", web.url("/whole"))[0]


def test_what_a_server_says_cannot_steer_a_terminal(web: Web, target: Path) -> None:
    def answer(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 404 \x1b[2Jgone\r\nContent-Length: 0\r\n\r\n")

    assert "answers 404 [2Jgone" in refused(target, web.has("/esc", answer))


def test_a_part_that_is_a_link_is_not_written_through(web: Web, target: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    target.parent.mkdir()
    part(target).symlink_to(victim)
    assert "cannot be written" in refused(target, web.url("/whole"))
    assert victim.read_bytes() == b"precious"


def test_a_folder_in_the_place_of_the_file_is_named_before_anything_is_asked(web: Web, target: Path) -> None:
    target.mkdir(parents=True)
    with pytest.raises(FigmentError, match=r"is a folder, where file.bin is to lie"):
        fetch(published(web.url("/whole")), target, patience=SOON)
    assert not web.asked


def test_many_that_fail_at_once_all_say_why(web: Web, target: Path) -> None:
    """Each deletes the empty part that it leaves, perhaps while the next one looks for it."""
    gone = web.has("/gone", status(404))

    def try_it(_: int) -> str:
        with pytest.raises(FigmentError) as error:
            fetch(published(gone), target, patience=SOON)
        return str(error.value)

    with ThreadPoolExecutor(6) as pool:
        said = set(pool.map(try_it, range(120)))
    assert all("answers 404" in line for line in said), said
