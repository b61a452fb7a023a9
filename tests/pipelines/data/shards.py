"""Data sets made on the spot, as the ingest would leave them in storage."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs as pafs

from pipelines.data.columns import Column
from pipelines.data.manifest import Manifest, Shard, save_manifest
from pipelines.objects import write_object


def write_shard(
    fs: pafs.FileSystem,
    root: str,
    images: np.ndarray,
    labels: np.ndarray,
    encoding: str = "raw",
    name: str = "",
    columns: Mapping[str, np.ndarray] | None = None,
) -> Shard:
    """uint8 (N, C, H, W), (N,) and columns (N, width) -> one Parquet object under `root` with one row group."""
    if encoding == "raw":
        width = int(np.prod(images.shape[1:]))
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(images), [None, pa.py_buffer(np.ascontiguousarray(images))]
        )
    else:
        column = pa.array([_encode(image, encoding) for image in images], pa.binary())
    table = pa.table({"image": column, "label": pa.array(labels, pa.int32())})
    content = hashlib.sha256(images.tobytes() + labels.astype("<i4").tobytes())
    for key, values in (columns or {}).items():
        element = pa.field("element", pa.from_numpy_dtype(values.dtype), nullable=False)
        numbers = pa.array(values.tolist(), pa.list_(element))
        table = table.append_column(pa.field(key, numbers.type, nullable=False), numbers)
        content.update(f"{key} {values.dtype} {values.shape[1]}\n".encode() + values.tobytes())
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=max(1, len(images)), use_dictionary=False)
    data = sink.getvalue()
    path = f"shards/{name or content.hexdigest()[:16]}.parquet"
    write_object(fs, f"{root}/{path}", data)
    return Shard(path, len(images), len(data), hashlib.sha256(data).hexdigest(), content.hexdigest())


def write_dataset(
    fs: pafs.FileSystem,
    name: str,
    shard_rows: Sequence[int],
    *,
    shape: tuple[int, int, int] = (1, 4, 4),
    encoding: str = "raw",
    split: str = "train",
    columns: Sequence[Column] = (),
) -> Manifest:
    """A data set whose row `i`, in stored order, has label `i`, the pixels of `image_of(i, shape)` and the numbers of
    `numbers_of(i, column)`."""
    shards, row = [], 0
    for rows in shard_rows:
        ids = np.arange(row, row + rows)
        images = np.stack([image_of(i, shape) for i in ids]) if rows else np.empty((0, *shape), np.uint8)
        numbers = {c.name: np.array([numbers_of(i, c) for i in ids], c.dtype).reshape(-1, c.width) for c in columns}
        shards.append(
            write_shard(fs, f"datasets/{name}", images, ids.astype(np.int32), encoding, columns=numbers or None)
        )
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
        columns=tuple(columns),
    )
    save_manifest(fs, manifest)
    return manifest


def image_of(row: int, shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, shape, dtype=np.uint8)


def numbers_of(row: int, column: Column) -> np.ndarray:
    """(width,): whole numbers, which every type holds."""
    return (7 * row + np.arange(column.width)) % 251


def _encode(image: np.ndarray, encoding: str) -> bytes:
    sink = io.BytesIO()
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(sink, format=encoding.upper())
    return sink.getvalue()
