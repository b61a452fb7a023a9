"""What is in a shard is decoded as what the ingest wrote there, and as nothing else."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipelines.data.windows import Layout, decode
from pipelines.errors import FigmentError
from tests.pipelines.data.archives import picture
from tests.pipelines.data.test_limits import png


@pytest.mark.parametrize(
    ("encoding", "data", "reason"),
    [
        ("png", picture(0, 8, 8, form="EPS"), "it is no PNG file"),
        ("png", picture(0, 8, 8, form="JPEG"), "it is no PNG file"),
        ("jpeg", picture(0, 8, 8, form="PNG"), "it is no JPEG file"),
        ("webp", b"nothing", "it is no WEBP file"),
        ("png", png(9_000), r"has shape \(3, 9000, 9000\), the manifest says \(3, 8, 8\)"),
        ("png", png(20_000), "cannot be decoded"),
    ],
)
def test_only_the_encoding_and_the_shape_of_the_manifest(encoding: str, data: bytes, reason: str) -> None:
    layout = Layout("a", "datasets/a", (3, 8, 8), encoding)

    def block(image: bytes) -> pa.Table:
        return pa.table({"image": [image], "label": pa.array([0], pa.int32()), "where": ["row 4 of shard x"]})

    assert decode(layout, block(picture(0, 8, 8, form=encoding.upper()))).num_rows == 1
    with pytest.raises(FigmentError, match=f"row 4 of shard x .*{reason}") as error:
        decode(layout, block(data))
    assert "0x" not in str(error.value)
