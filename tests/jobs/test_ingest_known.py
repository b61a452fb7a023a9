"""`python -m jobs.ingest NAME`: a data set known by name, from a real web server into a folder."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from infra.storage import cache_folder, open_storage
from jobs.ingest import IngestJob, _DownloadLine, run
from jobs.submit import overlay
from jobs.train import bring_data
from pipelines.config import DataSpec
from pipelines.data.download import PublishedFile
from pipelines.data.ingest import ingested
from pipelines.data.ingest_options import IngestOptions, ingest_key, plan_layout
from pipelines.data.known import KNOWN, Known, download, nearest
from pipelines.data.manifest import load_manifest
from pipelines.data.sources import FORMATS
from pipelines.data.sources_io import Limits
from pipelines.errors import FigmentError
from pipelines.recipes.recipe import Downloaded, Recipe
from tests.pipelines.data import archives
from tests.pipelines.data.archives import random_images
from tests.pipelines.training.toys import toy_spec

ROOT = Path(__file__).parents[2]

RUN = """
import sys
from jobs.ingest import main
from pipelines.data.download import PublishedFile
from pipelines.data.known import Known
main({"tiny": eval(sys.argv.pop(1))})
"""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """(url of a real web server over `tmp_path`/web, paths that it was asked for)."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def entry(url: str, folder: Path, **changes: object) -> Known:
    """An entry for the files of a folder, as a publisher would write it down."""
    files = tuple(
        PublishedFile(p.name, p.stat().st_size, hashlib.md5(p.read_bytes()).hexdigest(), (f"{url}/{p.name}",))
        for p in sorted(folder.iterdir())
    )
    tiny = Known("tiny", "idx", (1, 28, 28), files, "https://example.org/tiny", "here", "Somebody (2026)", "none")
    return replace(tiny, **changes)


@pytest.fixture
def tiny(tmp_path: Path, web: tuple[str, list[str]]) -> Known:
    archives.idx(tmp_path / "web", random_images(30, (1, 28, 28)), random_images(9, (1, 28, 28)))
    return entry(web[0], tmp_path / "web")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIGMENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(known: Known, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As a user starts it."""
    command = [sys.executable, "-c", RUN, repr(known), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)


def refused(known: Known, source: str | Path, store: Path, **options: str) -> str:
    with pytest.raises(FigmentError) as error:
        run(IngestJob(str(source), str(store), **options), {"tiny": known})
    assert not (store / "datasets").exists()
    return str(error.value)


def test_a_name_is_downloaded_once_and_ingested_once(
    tmp_path: Path,
    cache: Path,
    tiny: Known,
    web: tuple[str, list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, asked = start(tiny, "tiny", tmp_path / "store"), web[1]
    assert first.returncode == 0, first.stderr
    assert f"downloading tiny to {cache}/datasets/tiny" in first.stdout
    assert all(f"{f.name}  {f.bytes:,} of {f.bytes:,} bytes  100%" in first.stdout for f in tiny.files)
    manifest = load_manifest(open_storage(str(tmp_path / "store")), "tiny")
    assert f"complete: tiny@{manifest.version}" in first.stdout and manifest.rows("train") == 30
    assert manifest.source["url"] == tiny.page and manifest.source["citation"] == "Somebody (2026)"
    assert manifest.source["files"] == {f.name: f"md5:{f.md5}" for f in tiny.files}
    assert len(asked) == 4

    # The files are here for another name in another store. The version is that of the same files read from a folder.
    run(IngestJob("tiny", str(tmp_path / "other"), dataset_name="mine"), {"tiny": tiny})
    run(IngestJob(str(tmp_path / "web"), str(tmp_path / "other"), dataset_name="folder"), {"tiny": tiny})
    out = capsys.readouterr().out
    assert f"tiny lies in {cache}/datasets/tiny" in out and len(asked) == 4
    assert f"complete: mine@{manifest.version}" in out and f"complete: folder@{manifest.version}" in out

    # What is ingested is told before anything is downloaded, even where nothing lies any more.
    monkeypatch.setenv("FIGMENT_CACHE", str(tmp_path / "empty"))
    run(IngestJob("tiny", str(tmp_path / "store")), {"tiny": tiny})
    assert f"already there: tiny@{manifest.version}" in capsys.readouterr().out
    assert len(asked) == 4 and not (tmp_path / "empty").exists()


def test_a_dry_run_downloads_nothing(
    tmp_path: Path, cache: Path, tiny: Known, web: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(IngestJob("tiny", str(tmp_path / "store"), dry_run=True), {"tiny": tiny})
    out = capsys.readouterr().out
    assert f"from {tiny.files[0].urls[0]} … to {cache}/datasets/tiny" in out
    assert "1 x 28 x 28, stored as raw" in out and web[1] == []
    assert not cache.exists() and not (tmp_path / "store").exists()


def test_wrong_bytes_are_a_sentence_and_nothing_is_ingested(tmp_path: Path, cache: Path, tiny: Known) -> None:
    wrong = replace(tiny, files=tuple(replace(file, md5="0" * 32) for file in tiny.files))
    done = start(wrong, "tiny", tmp_path / "store")
    assert done.returncode == 2 and re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    for part in (wrong.files[0].urls[0], tiny.files[0].md5, "0" * 32, "jobs.ingest PATH --dataset-name tiny"):
        assert part in done.stderr
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "store/datasets").exists()


def test_names_that_nobody_knows_are_answered_with_the_nearest(
    tmp_path: Path, tiny: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    assert refused(tiny, "tinny", store).endswith("is known by that name (tiny); did you mean 'tiny'?")
    assert refused(tiny, "xyz", store).endswith("is known by that name (tiny)")
    assert "needs --dataset-name" in refused(tiny, tmp_path / "web", store)
    assert "leave out --format" in refused(tiny, "tiny", store, format="folders")
    asked = {name: nearest(name, KNOWN) for name in ("MNIST", "cifar-10", "fashion_mnist", "imagenet")}
    assert asked == {"MNIST": "mnist", "cifar-10": "cifar10", "fashion_mnist": "fashion-mnist", "imagenet": None}
    # A folder of that name goes before the name, as it always did.
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "not the data set known by that name" in refused(tiny, "tiny", store)


def test_the_cache_is_where_the_environment_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("FIGMENT_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/somebody")
    assert cache_folder() == Path("/var/cache/somebody/figment")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_folder() == Path("/home/somebody/.cache/figment")


def test_progress_lines_have_share_and_speed_and_lie_over_each_other(
    tiny: Known, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ingest.LOG_EVERY_S", 0.0)
    line, file = _DownloadLine(), replace(tiny.files[0], bytes=40_000_000)
    for got in (10_000_000, 20_000_000, 40_000_000):
        line.show(file, got)
    shown = capsys.readouterr().out.splitlines(keepends=True)
    pattern = r"  \S+  20,000,000 of 40,000,000 bytes  50%  [\d,.]+ MB/s  ETA \d+:\d\d\n"
    assert len(shown) == 3 and re.fullmatch(pattern, shown[1]) and shown[2].endswith(" 100%\n")
    # As `jobs.submit` shows a log on a terminal.
    assert [overlay(text, False)[1] for text in shown] == [False, True, False]


def test_help_lists_what_is_known() -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.ingest", "--help"], cwd=ROOT, capture_output=True, text=True)
    text = " ".join(done.stdout.replace("│", " ").split())
    assert f"downloaded to $FIGMENT_CACHE (default: ~/.cache/figment): {', '.join(KNOWN)}." in text


@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
def test_entries_are_complete(known: Known) -> None:
    assert known.format in FORMATS and KNOWN[known.name] is known
    assert known.page and known.published and known.citation and known.licence
    assert len({file.md5 for file in known.files}) == len(known.files)
    for file in known.files:
        assert re.fullmatch("[0-9a-f]{32}", file.md5) and file.bytes > 0
        assert len(set(file.urls)) >= 2
        assert all(re.fullmatch(rf"https?://[\w.-]+(/[\w.~-]+)*/{re.escape(file.name)}", url) for url in file.urls)


@pytest.mark.parametrize("size", [None, 28, 32])
@pytest.mark.parametrize("kind", ["idx", "cifar10-binary", "cifar100-binary", "svhn", "imagenet-train"])
def test_the_key_is_known_before_the_download(tmp_path: Path, web: tuple[str, list[str]], kind: str, size: int) -> None:
    place = tmp_path / "web"
    place.mkdir()
    shape: tuple[int, int, int] | None = (3, 32, 32)
    if kind == "idx":
        archives.idx(place, random_images(30, (1, 28, 28)), random_images(9, (1, 28, 28)))
        shape = (1, 28, 28)
    elif kind == "cifar10-binary":
        archives.cifar10_binary(place / "c.tar.gz", [random_images(20)], random_images(10))
    elif kind == "cifar100-binary":
        archives.cifar100_binary(place / "c.tar.gz", random_images(20), random_images(10))
    elif kind == "svhn":
        archives.svhn(place, {"train": random_images(20), "test": random_images(10)})
    else:
        archives.imagenet_train(place / "i.tar", {"n00000001": [archives.picture(1)]})
        shape = None
    known = entry(web[0], place, format=kind, shape=shape)
    options = IngestOptions("d", format=kind, size=size)
    source = known.source(tmp_path / "cache", Limits())
    before = ingest_key(source, options, known.layout(options))
    download(known, tmp_path / "cache")
    layout, images = plan_layout(source, options)
    images.close()
    assert ingest_key(source, options, layout) == before
    assert ingested(open_storage(str(tmp_path / "store")), "d", before) is None
    changed = replace(known, files=tuple(replace(file, md5="0" * 32) for file in known.files))
    assert ingest_key(changed.source(tmp_path / "cache", Limits()), options, layout) != before


def test_a_recipe_that_names_a_known_data_set_does_not_take_a_folder_of_that_name(
    tiny: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOWN, "tiny", tiny)  # type: ignore[misc]
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    recipe = Recipe(lambda: replace(toy_spec("vae"), data=DataSpec("tiny")), Downloaded("tiny"), "2 CPU cores")
    store = open_storage(str(tmp_path / "store"))
    bring_data("tiny", recipe, store, str(tmp_path / "store"))
    assert load_manifest(store, "tiny").rows("train") == 30


def test_what_lies_unpacked_beside_the_published_files_is_not_read(tiny: Known, tmp_path: Path) -> None:
    """The checksums are those of the packed files."""
    download(tiny, cache_folder())
    folder = tiny.folder(cache_folder())
    packed = sorted(folder.glob("*.gz"))
    assert len(packed) == 4
    for path in packed:
        plain = bytearray(gzip.decompress(path.read_bytes()))
        plain[-1] ^= 1
        path.with_suffix("").write_bytes(plain)
    run(IngestJob("tiny", str(tmp_path / "store")), {"tiny": tiny})
    run(IngestJob(str(tmp_path / "web"), str(tmp_path / "store"), dataset_name="published"))
    fs = open_storage(str(tmp_path / "store"))
    assert load_manifest(fs, "tiny").version == load_manifest(fs, "published").version
