"""Data sets made on the spot, as the ingest would leave them in storage."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs as pafs

from pipelines.data.manifest import Manifest, Shard, save_manifest
from pipelines.objects import write_object


def write_shard(
    fs: pafs.FileSystem, root: str, images: np.ndarray, labels: np.ndarray, encoding: str = "raw", name: str = ""
) -> Shard:
    """uint8 (N, C, H, W) and (N,) -> one Parquet object under `root` with one row group."""
    if encoding == "raw":
        width = int(np.prod(images.shape[1:]))
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(images), [None, pa.py_buffer(np.ascontiguousarray(images))]
        )
    else:
        column = pa.array([_encode(image, encoding) for image in images], pa.binary())
    table = pa.table({"image": column, "label": pa.array(labels, pa.int32())})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=max(1, len(images)), use_dictionary=False)
    data = sink.getvalue()
    content = hashlib.sha256(images.tobytes() + labels.astype("<i4").tobytes()).hexdigest()
    path = f"shards/{name or content[:16]}.parquet"
    write_object(fs, f"{root}/{path}", data)
    return Shard(path, len(images), len(data), hashlib.sha256(data).hexdigest(), content)


def write_dataset(
    fs: pafs.FileSystem,
    name: str,
    shard_rows: Sequence[int],
    *,
    shape: tuple[int, int, int] = (1, 4, 4),
    encoding: str = "raw",
    split: str = "train",
) -> Manifest:
    """A data set whose row `i`, in stored order, has label `i` and the pixels of `image_of(i, shape)`."""
    shards, row = [], 0
    for rows in shard_rows:
        ids = np.arange(row, row + rows)
        images = np.stack([image_of(i, shape) for i in ids]) if rows else np.empty((0, *shape), np.uint8)
        shards.append(write_shard(fs, f"datasets/{name}", images, ids.astype(np.int32), encoding))
        row += rows
    manifest = Manifest(
        name=name,
        splits={split: tuple(shards)},
        image_shape=shape,
        encoding=encoding,
        label_names=("row",),
        channel_mean=(127.5,) * shape[0],
        source={"format": "made by the tests"},
        created_at="2026-01-01T00:00:00+00:00",
    )
    save_manifest(fs, manifest)
    return manifest


def image_of(row: int, shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, shape, dtype=np.uint8)


def _encode(image: np.ndarray, encoding: str) -> bytes:
    sink = io.BytesIO()
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(sink, format=encoding.upper())
    return sink.getvalue()
