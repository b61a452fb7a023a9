"""One image file's way through `prepare`: what is stored of it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipelines.data.images import Bad, Row, prepare
from pipelines.data.sources_io import EncodedImage


def stored(data: bytes, size: int = 32, encoding: str = "raw") -> Row | Bad:
    (item,) = prepare([EncodedImage("train", data, 3, "a/b.jpeg (byte 512)")], size, encoding)
    return item


def pixels(data: bytes, size: int = 32) -> np.ndarray:
    row = stored(data, size)
    assert isinstance(row, Row), row
    return np.frombuffer(row.image, np.uint8).reshape(3, size, size).astype(int)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()
