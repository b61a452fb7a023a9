"""Columns: named numbers, always as many of them, that a row carries beside its label (attributes, factors, …).

They are described once, in the manifest, and lie in each shard as a Parquet list of numbers of one type; whoever reads
them has them as one block of memory, without a Python object a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

DTYPES = ("float32", "int32", "uint8")
MOST_COLUMNS, MOST_ENTRIES, LONGEST_NAME = 32, 4_096, 100
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("image", "images", "label", "labels", "where")  # what else a row has, here or in a source

Values = Mapping[str, Sequence[float] | np.ndarray]
"""Name of a column -> its numbers in one row."""


class ColumnError(ValueError):
    """What is wrong with a column; whoever catches it says where."""


@dataclass(frozen=True)
class Column:
    """One column of a data set."""

    name: str
    entries: tuple[str, ...]  # what each of its numbers means
    dtype: str = "float32"  # of DTYPES

    def __post_init__(self) -> None:
        if not (_NAME.fullmatch(self.name) and len(self.name) <= LONGEST_NAME) or self.name in _TAKEN:
            raise ColumnError(
                f"a column cannot be called {self.name[:40]!r}: use lower case letters, digits and '_', begin with a"
                f" letter, and leave out {', '.join(_TAKEN)}"
            )
        if self.dtype not in DTYPES:
            raise ColumnError(f"column {self.name!r} is of {self.dtype!r}, columns are of {', '.join(DTYPES)}")
        if not 1 <= len(self.entries) <= MOST_ENTRIES:
            raise ColumnError(f"column {self.name!r} has {len(self.entries):,} numbers, not 1 … {MOST_ENTRIES:,}")
        if not all(isinstance(entry, str) and 0 < len(entry) <= LONGEST_NAME for entry in self.entries):
            raise ColumnError(f"the entries of column {self.name!r} need names of 1 … {LONGEST_NAME} characters each")
        if len(set(self.entries)) < self.width:
            twice = next(entry for entry in self.entries if self.entries.count(entry) > 1)
            raise ColumnError(f"two entries of column {self.name!r} are called {twice!r}")

    @property
    def width(self) -> int:
        return len(self.entries)

    @property
    def stored(self) -> pa.DataType:
        """Its type in a shard."""
        return pa.list_(self._element)

    @property
    def _element(self) -> pa.Field:
        return pa.field("element", pa.from_numpy_dtype(self.dtype), nullable=False)

    def check(self, values: Sequence[float] | np.ndarray) -> None:
        """`ColumnError` for numbers that are not those of a row."""
        found = np.asarray(values)
        if found.dtype.kind not in "fiub":
            raise ColumnError(f"column {self.name!r} holds something else than numbers")
        if found.shape != (self.width,):
            raise ColumnError(f"column {self.name!r} has shape {found.shape}, {self.width} numbers are described")
        fits = self._fits(found)
        if not fits.all():
            i = int(np.argmin(fits))
            raise ColumnError(f"{self.entries[i]!r} of column {self.name!r} is {found[i]}, which is no {self.dtype}")

    def _fits(self, found: np.ndarray) -> np.ndarray:
        if self.dtype == "float32":
            with np.errstate(over="ignore"):
                return np.isfinite(found.astype(np.float32))
        limits = np.iinfo(self.dtype)
        return (found >= limits.min) & (found <= limits.max) & (found == np.trunc(found))

    def stack(self, rows: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
        """(N, width), little-endian, of the numbers of N rows that were checked."""
        return np.array(rows, np.dtype(self.dtype).newbyteorder("<")).reshape(-1, self.width)

    def as_list(self, values: np.ndarray) -> pa.ListArray:
        """(N, width) as a shard stores them."""
        offsets = pa.array(np.arange(0, values.size + 1, self.width, dtype=np.int32))
        flat = pa.array(np.ascontiguousarray(values, self.dtype).reshape(-1))
        return pa.ListArray.from_arrays(offsets, flat, type=self.stored)

    def as_block(self, values: np.ndarray) -> pa.FixedSizeListArray:
        """(N, width) as the stream hands them on, without a copy."""
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=pa.list_(self._element, self.width))

    def numbers(self, column: pa.ChunkedArray) -> np.ndarray:
        """(N, width) of either of the two, without a copy where it is one chunk. `ColumnError` for uneven lists."""
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        for chunk in chunks:
            if isinstance(chunk, pa.ListArray):
                widths = np.diff(chunk.offsets.to_numpy())
                if chunk.null_count or not (widths == self.width).all():
                    raise ColumnError(f"not every row of column {self.name!r} has {self.width} numbers")
        parts = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.width) for chunk in chunks]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self.width), self.dtype)


def check_described(columns: Sequence[Column]) -> None:
    """`ColumnError` for columns that cannot stand beside one another."""
    if len(columns) > MOST_COLUMNS:
        raise ColumnError(f"{len(columns)} columns are described, a row can have {MOST_COLUMNS}")
    names = [column.name for column in columns]
    if len(set(names)) < len(names):
        raise ColumnError(f"two columns are called {next(n for n in names if names.count(n) > 1)!r}")


def check_row(columns: Sequence[Column], values: Values) -> None:
    """`ColumnError` for a row that has not these columns, and no others."""
    for name in values:
        if all(column.name != name for column in columns):
            raise ColumnError(f"it has a column {name[:40]!r}, which is not described")
    for column in columns:
        if column.name not in values:
            raise ColumnError(f"it has no column {column.name!r}")
        column.check(values[column.name])
