"""The pickles of CIFAR-10: a dict of plain things, or one refusal; nothing runs, crashes or fills the memory."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.pickles import OPCODES, PickleError, unpickle
from pipelines.data.sources import read_images
from pipelines.errors import FigmentError
from tests.pipelines.data import archives
from tests.pipelines.data.archives import local, random_images, tar_bytes

ROOT = Path(__file__).parents[3]
BATCH = random_images(4)
FOLDER = "cifar-10-batches-py"


def memoized(images: archives.Images) -> bytes:
    """A batch to the letter as Python 2's cPickle wrote the official ones, with everything put into the memo."""
    data = images.pixels.tobytes()
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05("
        + b"".join(b"K" + bytes([label]) for label in images.labels)
        + b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        + b"(K\x01M"
        + struct.pack("<H", len(images.pixels))
        + b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        + b"K\x00tb\x89T"
        + struct.pack("<i", len(data))
        + data
        + b"tbU\tfilenamesq\x0c]q\x0d(U\x05a.pngq\x0eh\x0eh\x0eh\x0eeu."
    )


@pytest.mark.parametrize("data", [archives.cifar_pickle(BATCH), memoized(BATCH)])
def test_a_batch_is_read(data: bytes) -> None:
    value = unpickle(data)
    assert np.array_equal(value[b"data"], BATCH.pixels.reshape(4, -1)) and value[b"data"].dtype == np.uint8
    assert value[b"labels"] == BATCH.labels.tolist()
    assert value[b"batch_label"] == b"training batch 1 of 5"


def test_what_python_3_packs_again_is_read() -> None:
    value = {b"labels": [1, 2], b"label_names": [b"cat"], b"text": "x", b"more": (None, True, {b"a": 1})}
    for protocol in (3, 4):
        assert unpickle(pickle.dumps(value, protocol)) == value
        again = unpickle(pickle.dumps({b"data": BATCH.pixels, b"same": BATCH.pixels}, protocol))
        assert np.array_equal(again[b"data"], BATCH.pixels) and again[b"same"] is again[b"data"]


EVIL = r"""
import sys
from pipelines.data.sources import read_images
from pipelines.errors import FigmentError
from tests.pipelines.data.archives import local
from pathlib import Path
try:
    list(read_images(local(Path(sys.argv[1])), "cifar10-python"))
except FigmentError as error:
    print(error)
"""


def test_bytes_of_the_file_never_become_objects(tmp_path: Path) -> None:
    """An array of objects over eight bytes of the file: with NumPy's own `__setstate__` a segmentation fault."""
    objects = b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x01t"
        + objects
        + b"\x89U\x08AAAAAAAAtb"
    )
    pixels = archives.python2_pickle(BATCH.pixels[:1].reshape(1, -1))[2:-1]
    evil = b"\x80\x02}(U\x04data" + pixels + b"U\x06labels](" + array + b"eu."
    path = tmp_path / "cifar.tar"
    path.write_bytes(tar_bytes({f"{FOLDER}/data_batch_1": evil}))
    done = subprocess.run(
        [sys.executable, "-c", EVIL, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr  # -11: killed by a segmentation fault
    assert "data_batch_1" in done.stdout and "something else than a uint8 array" in done.stdout


DEEP = OPCODES // 4


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"}r\xff\xff\xff\xff.", None),  # a memo of 4,294,967,295 places, if it were an array
        (b"T\xff\xff\xff\x7fabc", "2147483647"),
        (b"\x8e" + b"\xff" * 7 + b"\x0fabc", "BINBYTES8|byte"),
        (b"X\xff\xff\xff\x7fabc", "2147483647"),
        (b"\x8b\xff\xff\xff\x7f1", "long4"),
        (b"\x95" + b"\xff" * 8 + b"}.", None),  # a frame, which only says how much may be read at once
        (b"]" * (OPCODES + 2) + b".", "opcodes"),
        (b"]" * DEEP + b"a" * (DEEP - 1) + b".", "list"),
        (b"\x85" * 5, "stack"),
        (b"}(tK\x01s.", "keys"),  # hashing a tuple of tuples of tuples … never ends
        (b"}U\x01ah\x05s.", "recalls object 5"),
        (b"(i__builtin__\neval\n.", "INST"),
        (b"cos\nsystem\n(U\x04truetR.", "os.system"),
        (b"cnumpy\nndarray\n(K\x01tR.", "something else"),
        (b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR.", "something else"),
        (b"", "exhausted"),
        (b"\xff", "opcode"),
    ],
)
def test_hostile_pickles_are_refused_in_bounded_memory(body: bytes, reason: str | None) -> None:
    tracemalloc.start()
    try:
        if reason is None:
            assert unpickle(b"\x80\x02" + body) == {}
        else:
            with pytest.raises(PickleError, match=reason):
                unpickle(b"\x80\x02" + body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6


def test_lists_that_unfold_without_end_are_no_labels(tmp_path: Path) -> None:
    """Forty tuples of two, each in the next: 2^40 numbers, for whoever unfolds them."""
    bomb = b"K\x01K\x01\x86" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(40))
    pixels = archives.python2_pickle(BATCH.pixels[:1].reshape(1, -1))[2:-1]
    path = tmp_path / "cifar.tar"
    for labels in (bomb, b"\x8a\xff" + b"\x7f" * 255, b"U\x01x", b"\x88"):
        batch = b"\x80\x02}(U\x04data" + pixels + b"U\x06labels](" + labels + b"eu."
        path.write_bytes(tar_bytes({f"{FOLDER}/data_batch_1": batch}))
        with pytest.raises(FigmentError, match="no list of numbers"):
            next(read_images(local(path), "cifar10-python"))
    for names in (b"](" + b"U\x02\xff\xfe" * 10 + b"e", b"K\x05", b"]", bomb):
        path.write_bytes(tar_bytes({f"{FOLDER}/batches.meta": b"\x80\x02}U\x0blabel_names" + names + b"s."}))
        with pytest.raises(FigmentError, match=r"ten label names|no images"):
            next(read_images(local(path), "cifar10-python"))


WHOLE = [archives.cifar_pickle(random_images(1)), memoized(random_images(2)), pickle.dumps({b"a": BATCH.pixels}, 4)]
FRAGMENTS = [
    *(bytes([code]) for code in b"}](tesuaNRb\x85\x86\x87\x88\x89)l0122Q\x93\x94d\x8f\x90"),
    *(b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"K\x01", b"M\x00\x0c"),
    *(b"J\xff\xff\xff\xff", b"\x8a\x01\x05", b"U\x01a", b"U\x02u1", b"U\x02O8", b"T\x03\0\0\0abc", b"X\x01\0\0\0x"),
    *(b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cos\nsystem\n"),
    *(b"U\x04data", b"U\x06labels", b"C\x01z", b"\x8c\x05numpy", b"G" + b"\0" * 8, b"\x80\x02", b"I1\n", b"S'a'\n"),
    archives.python2_pickle(np.ones((1, 3), np.uint8))[2:-1],
]


def check(data: bytes) -> None:
    try:
        value = unpickle(data)
    except PickleError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    assert all(type(key) is bytes for key in value)
    arrays = [item for item in value.values() if isinstance(item, np.ndarray)]
    assert all(array.dtype == np.uint8 and array.nbytes <= len(data) for array in arrays)


@settings(max_examples=300, deadline=None)
@given(
    whole=st.sampled_from(WHOLE),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=6)), max_size=8),
)
def test_damaged_pickles_never_crash(whole: bytes, edits: list[tuple[float, int, bytes]]) -> None:
    data = whole
    for place, gone, new in edits:
        # Most of a batch is pixels: half of the edits go where the opcodes are.
        at = int(place * 2 * 250) if place < 0.5 else int((place - 0.5) * 2 * len(data))
        data = data[:at] + new + data[at + gone :]
    check(data)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=3), max_size=40))
def test_any_stream_of_opcodes_never_crashes(fragments: list[bytes]) -> None:
    check(b"\x80\x02" + b"".join(fragments) + b".")
    check(b"\x80\x02}" + b"".join(fragments) + b"u.")
