"""Unsigned integers in groups of columns, as libraries unpack them, packed without loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.kernels.formats.integers import INT4, UINT8
from qlora_compile.kernels.packed import PackedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that scales may have."""

_SIZES = (128, 64, 32)
_GROUPS = "quantise the model again in groups of a multiple of 32 columns, or of whole rows"


def setting_error(found: str, known: str) -> StoredWeightError:
    """Return the error for a `quantization_config` that has `found` instead of `known`."""
    problem, remedy = f"it has {found}, not {known}", f"convert the model to {known}"
    return StoredWeightError(tensor="quantization_config", problem=problem, remedy=remedy)


@dataclass(frozen=True)
class Grouped:
    """A model whose weights have a scale for every `group_size` columns; -1 for one per row."""

    group_size: int

    def columns(self, columns: int) -> int:
        """Return how many of so many columns share a scale."""
        return columns if self.group_size == -1 else self.group_size

    def groups(self, columns: int) -> int:
        """Return how many groups so many columns have."""
        return -(-columns // self.columns(columns))

    @staticmethod
    def size_in(settings: Mapping[str, Any]) -> int:
        """Return the `group_size` of a `quantization_config`. Raises StoredWeightError."""
        size = settings.get("group_size", 128)
        if not isinstance(size, int) or (size < 1 and size != -1):
            raise setting_error(f"group_size {size!r}", "a number of columns, or -1")
        return size


def packed_integers(
    codes: Tensor,
    bits: int,
    scales: Tensor,
    zeros: Tensor | int | None,
    *,
    group_size: int,
    minima: Tensor | None = None,
    index: Tensor | None = None,
) -> PackedWeight:
    """Return the weight (code - zero) * scale, or code * scale + minimum, [N, K], as `int4`, or as
    `uint8` above 4 bits.

    codes: uint8 [N, K] below 2 ** bits. scales: float16, bfloat16 or float32 [N, groups], with
    groups = ceil(K / group_size). zeros: [N, groups], integers of 0 to 255 of any dtype or floats,
    or the one zero 2 ** (bits - 1); None where there are minima, floats [N, groups]. index:
    integers [K], the group of each column; None for groups of neighbours. Codes of fewer bits than
    the format has are widened; scales of larger groups than the format has are repeated.

    Raises StoredWeightError about "scales", "zeros", "minima" or "index".
    """
    codes = codes.contiguous()
    rows, columns = codes.shape
    quant_format = INT4 if bits <= 4 else UINT8
    given = {"scales": scales, "zeros": zeros, "minima": minima}
    factors = {role: each for role, each in given.items() if isinstance(each, Tensor)}
    _check_factors(factors, (rows, math.ceil(columns / group_size)))
    kind = "minimum" if minima is not None else "none"
    if isinstance(zeros, int):
        codes = codes + (int(quant_format.symmetric_zero) - zeros)
    elif zeros is not None:
        kind = "float" if zeros.is_floating_point() else "integer"
    wide = functools.reduce(torch.promote_types, (each.dtype for each in factors.values()))
    factors = {role: each.to(wide) for role, each in factors.items()}
    if kind == "integer":
        factors["zeros"] = factors["zeros"].to(torch.uint8)
    size, repeats = _fitting(group_size, columns)
    count = math.ceil(columns / size)
    planes = [
        each.repeat_interleave(repeats, dim=1)[:, :count].contiguous() for each in factors.values()
    ]
    grouping = "consecutive"
    if index is not None and (index := _checked_index(index, columns, group_size)) is not None:
        grouping = "indexed"
        planes.append(index * repeats)
    layout = quant_format.layout(
        (rows, columns),
        group_size="row" if size == columns else size,
        zeros=kind,
        scales=str(wide).removeprefix("torch."),
        grouping=grouping,
    )
    return quant_format.packed(layout, [quant_format.stored_codes(codes), *planes])


def _check_factors(factors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    """Raise StoredWeightError unless all have the `shape` and finite values of a known dtype."""
    for role, each in factors.items():
        problem = None
        if each.shape != shape:
            problem = f"its shape is {list(each.shape)}, not {list(shape)}"
        elif role == "scales" and each.dtype not in FLOATS:
            problem = f"its dtype is {each.dtype}, none of {', '.join(map(str, FLOATS))}"
        elif not bool(each.isfinite().all()):
            problem = "it holds NaN or infinity"
        if problem is not None:
            remedy = "download the weights again, or quantise the model again"
            raise StoredWeightError(tensor=role, problem=problem, remedy=remedy)


def _checked_index(index: Tensor, columns: int, group_size: int) -> Tensor | None:
    """Return `index` as int32, None if its groups are of neighbouring columns."""
    groups = math.ceil(columns / group_size)
    if index.shape != (columns,) or not bool(((index >= 0) & (index < groups)).all()):
        problem = f"it does not hold {columns} group numbers from 0 to {groups - 1}"
        raise StoredWeightError(tensor="index", problem=problem, remedy="download the file again")
    index = index.to(torch.int32)
    neighbours = torch.arange(columns, device=index.device) // group_size
    return None if torch.equal(index, neighbours.to(torch.int32)) else index


def _fitting(group_size: int, columns: int) -> tuple[int, int]:
    """Return a group size that the formats have, and how many such groups make one of
    `group_size`."""
    if group_size >= columns:
        return columns, 1
    for size in _SIZES:
        if group_size % size == 0:
            return size, group_size // size
    problem = f"there is a scale for every {group_size} columns"
    raise StoredWeightError(tensor="scales", problem=problem, remedy=_GROUPS)
