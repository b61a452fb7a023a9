"""CelebA, aligned and cropped (Liu et al. 2015, https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html): three files.

    img_align_celeba.zip       img_align_celeba/000001.jpg …, 178 x 218 pixels
    list_attr_celeba.txt       the number of images; the names of 40 attributes; 000001.jpg and 40 times 1 or -1 …
    list_eval_partition.txt    000001.jpg and 0 (train), 1 (val) or 2 (test) …

Both lists are read first and held, 40 bytes an image. They and the directory of the zip must speak of the same images,
each once. Then the images come a split at a time as they lie in the zip, which holds the splits one after the other.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from pyarrow import fs as pafs

from pipelines.data.columns import Column, ColumnError
from pipelines.data.sources_files import IMAGE_SUFFIXES
from pipelines.data.sources_io import UNLABELLED, BadFile, EncodedImage, Images, Source, too_large
from pipelines.data.sources_zip import DamagedMemberError, open_zip, read_member

ARCHIVE, ATTRIBUTES, PARTITION = "img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"
COLUMN = "attributes"
WIDTH = 40  # attributes
SPLITS = {b"0": "train", b"1": "val", b"2": "test"}
LINE_BYTES = 4096  # the line of names, the longest, has some 500
TEXT_BYTES = 200_000_000  # of a list; the official ones have 26.7 and 2.8 million
_IMAGE = re.compile(rb"\d{6}\.jpg")
_VALUES = {b"1": 1, b"-1": 0}


@dataclass(frozen=True)
class _Listed:
    """What both lists say."""

    column: Column
    rows: dict[str, int]  # name of an image -> its place in what follows
    attributes: np.ndarray  # uint8 (N, 40)
    splits: list[str]  # N


def celeba_files(source: Source) -> dict[str, str]:
    """name -> path of what is there of the three files, in the folder that `source` is or beside the one that it is;
    none where the zip is not, since the lists say nothing without it."""
    parent, _, name = source.path.rpartition("/")
    folder = parent if name in (ARCHIVE, ATTRIBUTES, PARTITION) else source.path.rstrip("/")

    def is_there(file: str) -> bool:
        own = source.own is None or file in source.own
        return own and source.fs.get_file_info(f"{folder}/{file}").type == pafs.FileType.File

    if not is_there(ARCHIVE):
        return {}
    return {file: f"{folder}/{file}" for file in (ARCHIVE, ATTRIBUTES, PARTITION) if is_there(file)}


def celeba(source: Source) -> Images:
    """`source` is the folder, or one of its files (on the web folders cannot be listed)."""
    files = celeba_files(source)
    missing = [file for file in (ARCHIVE, ATTRIBUTES, PARTITION) if file not in files]
    if missing:
        source.refuse(
            f"has no {missing[0]}: {ARCHIVE}, {ATTRIBUTES} and {PARTITION} of CelebA must lie in one folder,"
            " with these names, the zip not unpacked"
        )
    listed = _listed(source, files[ATTRIBUTES], files[PARTITION])
    source.columns = (listed.column,)
    with open_zip(source, files[ARCHIVE]) as (stream, members):
        images = _images(source, members, listed)
        for split in SPLITS.values():
            for member, row in images:
                if listed.splits[row] != split:
                    continue
                source.at = where = f"{ARCHIVE}, {member.filename} (byte {member.header_offset:,})"
                largest = max(member.file_size, member.compress_size)
                if largest > source.limits.file_bytes:
                    yield BadFile(split, too_large(largest, source.limits), UNLABELLED, where)
                    continue
                try:
                    data = read_member(source, stream, member)
                except DamagedMemberError as error:
                    yield BadFile(split, str(error), UNLABELLED, where)
                    continue
                yield EncodedImage(split, data, UNLABELLED, where, {COLUMN: listed.attributes[row]})
    return ()


def _images(source: Source, members: list[zipfile.ZipInfo], listed: _Listed) -> list[tuple[zipfile.ZipInfo, int]]:
    """Each image with its row in the lists: one for one."""
    found: list[tuple[zipfile.ZipInfo, int]] = []
    seen = np.zeros(len(listed.rows), bool)
    for member in members:
        folder, _, base = member.filename.rpartition("/")
        if base.startswith(".") or "__MACOSX" in folder or not base.lower().endswith(IMAGE_SUFFIXES):
            continue
        source.at = f"{ARCHIVE}, {member.filename}"
        row = listed.rows.get(base)
        if row is None:
            source.refuse(f"has no row in {ATTRIBUTES}: the two are not of one release, fetch both again")
        if seen[row]:
            source.refuse("is the second image of that name")
        seen[row] = True
        found.append((member, row))
    source.at = ARCHIVE
    if not seen.all():
        name = [*listed.rows][int(np.argmin(seen))]
        source.refuse(
            f"lacks {name}, of which {ATTRIBUTES} has a row, and {np.sum(~seen) - 1:,} more; fetch it again, whole"
        )
    return found


def _listed(source: Source, attributes: str, partition: str) -> _Listed:
    lines = _lines(source, attributes)
    total, column = _total(source, next(lines, [])), _column(source, next(lines, []))
    rows: dict[str, int] = {}
    values = bytearray()
    for words in lines:
        if len(rows) == total:
            source.refuse(f"is a row too many, the first line counts {total:,}")
        name = _name(source, words[0])
        if name in rows:
            source.refuse(f"is the second row of {name}")
        if len(words) != WIDTH + 1:
            source.refuse(f"has {len(words) - 1} attributes, {WIDTH} are named in line 2")
        try:
            values += bytes([_VALUES[word] for word in words[1:]])
        except KeyError as error:
            source.refuse(f"has the attribute {_shown(error.args[0])}, they are 1 or -1")
        rows[name] = len(rows)
    source.at = ATTRIBUTES
    if len(rows) < total:
        source.refuse(f"has {len(rows):,} rows, its first line counts {total:,}: cut off, fetch it again")
    splits = _splits(source, partition, rows)
    return _Listed(column, rows, np.frombuffer(values, np.uint8).reshape(-1, WIDTH), splits)


def _total(source: Source, words: list[bytes]) -> int:
    if len(words) != 1 or not re.fullmatch(rb"[1-9]\d{0,5}", words[0]):
        source.at = ATTRIBUTES
        source.refuse(f"begins with {_shown(b' '.join(words))}, not with a line that says how many images it lists")
    return int(words[0])


def _column(source: Source, words: list[bytes]) -> Column:
    if len(words) != WIDTH:
        source.refuse(f"names {len(words)} attributes, CelebA has {WIDTH}")
    try:
        return Column(COLUMN, tuple(word.decode("utf-8", "replace") for word in words), "uint8")
    except ColumnError as error:
        source.refuse(f"names no attributes as they can be kept: {error}")


def _splits(source: Source, path: str, rows: dict[str, int]) -> list[str]:
    """The split of each row."""
    splits = [""] * len(rows)
    for words in _lines(source, path):
        name = _name(source, words[0])
        if name not in rows:
            source.refuse(f"has a row of {name}, {ATTRIBUTES} has none")
        if splits[rows[name]]:
            source.refuse(f"is the second row of {name}")
        if len(words) != 2 or words[1] not in SPLITS:
            source.refuse(
                f"gives {name} the part {_shown(b' '.join(words[1:]))}, it is 0 (train), 1 (validation) or 2 (test)"
            )
        splits[rows[name]] = SPLITS[words[1]]
    source.at = PARTITION
    if "" in splits:
        name = [*rows][splits.index("")]
        source.refuse(f"has no row of {name}, {ATTRIBUTES} has one, and {splits.count('') - 1:,} more are missing")
    return splits


def _name(source: Source, word: bytes) -> str:
    if not _IMAGE.fullmatch(word):
        source.refuse(f"begins with {_shown(word)}, which is no name like 000001.jpg")
    return word.decode("ascii")


def _lines(source: Source, path: str) -> Iterator[list[bytes]]:
    """The words of each line that has any, whatever blanks and line ends are around them."""
    base = path.rpartition("/")[2]
    size = 0
    with source.open(path) as stream:
        for number in count(1):
            line = stream.readline(LINE_BYTES + 1)
            source.at = f"{base}, line {number:,}"
            size += len(line)
            if len(line) > LINE_BYTES or size > TEXT_BYTES:
                source.refuse(
                    f"is longer than the {LINE_BYTES:,} bytes that a line has at most"
                    if len(line) > LINE_BYTES
                    else f"stands beyond the {TEXT_BYTES / 1e6:,} MB that a list of CelebA may have"
                )
            if not line:
                return
            if words := line.removeprefix(b"\xef\xbb\xbf").split():
                yield words


def _shown(word: bytes) -> str:
    return repr(word[:40].decode("utf-8", "replace"))
