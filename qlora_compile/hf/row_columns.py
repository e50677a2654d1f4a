"""Column: one column of several rows as flat arrays, so that all rows are checked at once."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Found = tuple[int, Any]
"""A row and the value to show for it."""


@dataclass(frozen=True)
class Column:
    """One column of several rows.

    values: all rows' values, one after another. counts: how many of these each row has. lengths:
    the last dimension of each row. dims: the number of dimensions of each row, 0 for a lone value.
    kinds: NumPy's letter for the dtype of each row. missing: which rows have no value.
    """

    values: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    dims: np.ndarray
    kinds: np.ndarray
    missing: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Column:
        arrays = [_array(row) for row in rows]
        numbers = all(array.dtype.kind in "iuf" for array in arrays)
        return cls(
            np.concatenate([array.ravel() for array in arrays], dtype=None if numbers else object),
            counts=np.array([array.size for array in arrays]),
            lengths=np.array([array.shape[-1] if array.ndim else 1 for array in arrays]),
            dims=np.array([array.ndim for array in arrays]),
            kinds=np.array([array.dtype.kind for array in arrays]),
            missing=np.array([row is None for row in rows]),
        )

    @classmethod
    def of_arrow(cls, column: Any) -> Column:
        """Return the Column of a pyarrow ChunkedArray, without a Python object for each value."""
        import pyarrow

        column = column.combine_chunks()
        is_list = isinstance(column, pyarrow.ListArray | pyarrow.LargeListArray)
        flat = column.flatten() if is_list else column
        is_number = pyarrow.types.is_integer(flat.type) or pyarrow.types.is_floating(flat.type)
        if not is_number or column.null_count or flat.null_count:
            return cls.of(column.to_pylist())
        ones = np.ones(len(column), dtype=np.int64)
        lengths: np.ndarray = np.diff(np.asarray(column.offsets)) if is_list else ones
        values = np.asarray(flat)
        return cls(
            values,
            counts=lengths,
            lengths=lengths,
            dims=ones * is_list,
            kinds=np.where(lengths > 0, values.dtype.kind, "i"),
            missing=ones == 0,
        )

    def of_kind(self, letters: str) -> np.ndarray:
        return np.isin(self.kinds, list(letters))

    def row_where(self, wrong: np.ndarray, shown: np.ndarray | None = None) -> Found | None:
        """Return the first row that is `wrong`, and what to show for it: by default its values."""
        if not wrong.any():
            return None
        row = int(wrong.argmax())
        end = int(self.counts[: row + 1].sum())
        values = self.values[end - int(self.counts[row]) : end].tolist()
        value = values if self.dims[row] else values[0]
        return row, reprlib.repr(value) if shown is None else shown[row]

    def value_where(self, wrong: np.ndarray) -> Found | None:
        """Return the row of the first value that is `wrong`, and the value."""
        if not wrong.any():
            return None
        place = int(wrong.argmax())
        row = int(np.searchsorted(np.cumsum(self.counts), place, side="right"))
        return row, self.values[place]


def _array(row: Any) -> np.ndarray:
    if row is None:
        return np.zeros(0, dtype=np.int64)
    if isinstance(row, torch.Tensor):
        row = row.detach().cpu()
        row = (row.float() if row.dtype == torch.bfloat16 else row).numpy()
    try:
        array = np.asarray(row)
    except ValueError:  # parts of the row have different lengths
        array = np.asarray(row, dtype=object)
    return array if array.size else array.astype(np.int64)
