"""A data set version at rest: Parquet shards and one `manifest.json`, written last. No manifest, no data set.

    datasets/NAME/VERSION/manifest.json
    datasets/NAME/shards/<first 16 hex digits of content_sha256>.parquet …

Shards are named after their content, so versions share what they have in common and a repeated ingest writes nothing
twice. A shard has two columns: `image` and `label` (int32, an index into `label_names`; -1 when unlabelled). With
`encoding` "raw" an image is fixed-size binary, C*H*W bytes in (C, H, W) order, else binary: one encoded file. Behind
them come the data set's own columns (`columns.py`), lists of numbers that the manifest describes.

VERSION is the first 12 hex digits of the content hash: of image shape, encoding, label names, columns where there are
some, and for each split the stored bytes, labels and columns of its rows, in their order and as they are divided into
shards. So it changes with

- the images, their labels and columns, and the order in which the source has them: members of an archive as they lie
  in it (a tar of the same files packed in another order is another version, its labels are the same), files of folders
  by name;
- size, encoding, rows a shard, the number of open shards that mix the rows, and which images were left out as bad;
- a release of Pillow that decodes or encodes to other bytes, or of torch that resizes to others.

It does not change with name, url, compression or times of the source, with when, where and on how many machines it was
ingested, with interruptions, or with the release of Arrow that wrote the Parquet files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from pyarrow import fs as pafs

from pipelines.data.columns import Column, check_described
from pipelines.errors import FigmentError
from pipelines.objects import children, exists, read_object, write_json

FORMAT = "figment-dataset-1"
DATASETS = "datasets"
LOG = logging.getLogger(__name__)


class NoDataSetError(FigmentError):
    """The storage holds no complete version of that name."""


@dataclass(frozen=True)
class Shard:
    path: str  # relative to datasets/NAME
    rows: int
    bytes: int  # size of the file
    sha256: str  # of the file: what the stream verifies
    content_sha256: str  # of images, labels, columns: what the version is named after, whatever wrote the file


@dataclass(frozen=True)
class Skipped:
    """Images that `--on-bad-image skip` left out."""

    count: int = 0
    members: tuple[str, ...] = ()  # the first 100, with the reason


@dataclass(frozen=True)
class Manifest:
    name: str
    splits: dict[str, tuple[Shard, ...]]
    image_shape: tuple[int, int, int]  # (C, H, W)
    encoding: str  # "raw", "png", "jpeg" or "webp"
    label_names: tuple[str, ...]
    channel_mean: tuple[float, ...]  # of the train split (the first split when there is none), in [0, 255]
    source: dict[str, Any]  # what was read: url, format, and what its citation is
    created_at: str  # ISO 8601, UTC
    skipped: Skipped = field(default_factory=Skipped)
    columns: tuple[Column, ...] = ()  # that every row has beside its label

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.shards(split))

    def shards(self, split: str) -> tuple[Shard, ...]:
        if split not in self.splits:
            raise FigmentError(
                f"data set {self.name!r} has no split {split!r}; it has {', '.join(sorted(self.splits))}"
            )
        return self.splits[split]

    @property
    def content_hash(self) -> str:
        """sha256 over what a reader of the data set can see: shape, encoding, labels and every row, in order."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "image_shape": self.image_shape,
            "encoding": self.encoding,
            "label_names": self.label_names,
            "splits": {
                split: [(s.rows, s.content_sha256) for s in shards] for split, shards in sorted(self.splits.items())
            },
        }
        if self.columns:  # else the hash is what it was before there were any
            body["columns"] = [asdict(column) for column in self.columns]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    @property
    def version(self) -> str:
        return self.content_hash[:12]

    @property
    def root(self) -> str:
        """What shard paths are relative to."""
        return f"{DATASETS}/{self.name}"

    @property
    def folder(self) -> str:
        return f"{self.root}/{self.version}"


def save_manifest(fs: pafs.FileSystem, manifest: Manifest) -> str:
    """Makes the data set version visible; returns its folder."""
    body = {"format": FORMAT, "version": manifest.version, "content_hash": manifest.content_hash, **asdict(manifest)}
    if not manifest.columns:
        del body["columns"]
    write_json(fs, f"{manifest.folder}/manifest.json", body)
    return manifest.folder


def load_manifest(fs: pafs.FileSystem, dataset: str) -> Manifest:
    """`dataset` is NAME (its newest complete version) or NAME@VERSION, where the first digits of VERSION will do.

    A version whose manifest cannot be read is passed over with a warning, for an old one must not block a newer one;
    it raises its error when it is the one that was asked for, or when no other is there.
    """
    name, _, version = dataset.partition("@")
    found = _read_versions(fs, name, version)
    if not found:
        known = [n for n in children(fs, DATASETS) if not n.startswith(".")]
        raise NoDataSetError(
            f"there is no complete data set {dataset!r} under {DATASETS}/ in the storage"
            f" (found: {', '.join(known) or 'none'});"
            f" ingest it with `python -m jobs.ingest SOURCE --dataset-name {name}`"
        )
    readable = _newest_first(found)
    if not readable:
        raise next(error for error in found.values() if isinstance(error, FigmentError))
    _warn_of_unreadable(fs, found, readable[0])
    return readable[0]


def versions(fs: pafs.FileSystem, name: str) -> list[Manifest]:
    """The complete versions of data set `name` whose manifests can be read, the newest first."""
    return _newest_first(_read_versions(fs, name))


def _newest_first(found: dict[str, Manifest | FigmentError]) -> list[Manifest]:
    readable = [manifest for manifest in found.values() if isinstance(manifest, Manifest)]
    return sorted(readable, key=lambda manifest: manifest.created_at, reverse=True)


def _read_versions(fs: pafs.FileSystem, name: str, begins: str = "") -> dict[str, Manifest | FigmentError]:
    """Path of the manifest -> the manifest, or why it cannot be read, of each version whose name begins so."""
    found: dict[str, Manifest | FigmentError] = {}
    for version in children(fs, f"{DATASETS}/{name}"):
        path = f"{DATASETS}/{name}/{version}/manifest.json"
        if not version.startswith(begins) or not exists(fs, path):
            continue
        try:
            found[path] = _parse(read_object(fs, path), path)
        except FigmentError as error:
            found[path] = error
        except FileNotFoundError:
            continue  # deleted since it was listed
    return found


def _warn_of_unreadable(fs: pafs.FileSystem, found: dict[str, Manifest | FigmentError], taken: Manifest) -> None:
    """When a version was made stands inside its manifest; of an unreadable one only the age of the file is known."""
    age = fs.get_file_info(f"{taken.folder}/manifest.json").mtime
    for path, error in found.items():
        if isinstance(error, FigmentError):
            written = fs.get_file_info(path).mtime
            newer = ", which may be newer by the age of its file" if age and written and written > age else ""
            LOG.warning("%s@%s is used, and this version passed over%s: %s", taken.name, taken.version, newer, error)


def _parse(data: bytes, path: str) -> Manifest:
    try:
        body = json.loads(data)
        if body["format"] != FORMAT:
            raise FigmentError(f"{path} has format {body['format']!r}, this version of Figment reads {FORMAT!r}")
        manifest = Manifest(
            name=body["name"],
            splits={split: tuple(Shard(**s) for s in shards) for split, shards in body["splits"].items()},
            image_shape=tuple(body["image_shape"]),
            encoding=body["encoding"],
            label_names=tuple(body["label_names"]),
            channel_mean=tuple(body["channel_mean"]),
            source=body["source"],
            created_at=body["created_at"],
            skipped=Skipped(body["skipped"]["count"], tuple(body["skipped"]["members"])),
            columns=tuple(Column(c["name"], tuple(c["entries"]), c["dtype"]) for c in body.get("columns", ())),
        )
        check_described(manifest.columns)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise FigmentError(f"{path} is not a readable manifest ({error!r}); ingest the data set again") from error
    if manifest.content_hash != body["content_hash"]:
        raise FigmentError(f"{path} does not match its own content hash: it was edited; ingest the data set again")
    return manifest
