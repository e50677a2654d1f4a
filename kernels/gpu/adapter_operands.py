"""Launches that turn an adapter's thin factors into operands of tensor cores."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.gpu.adapter_operand import adapter_operand_kernel
from qlora_compile.kernels.gpu.configs import adapter_terms, adapter_width, padded
from qlora_compile.kernels.gpu.launch import TRITON_DTYPES, Launch
from qlora_compile.kernels.gpu.parts import all_or_none, launched_together


@dataclass(frozen=True)
class AdapterFactors:
    """low [planes, M, rank], of which the sum counts, and up [C, rank], of any strides.

    scaling: one float32 element that multiplies the sum. total: [M, rank] with contiguous rows, of
    any dtype, to which the scaled sum is written. bits: as in AdapterStart.
    """

    low: Tensor
    up: Tensor
    scaling: Tensor | None = None
    total: Tensor | None = None
    bits: Tensor | None = None


@dataclass(frozen=True)
class AdapterOperand:
    """A thin factor for tensor cores: 16-bit values [rows, width], width a multiple of 16, and the
    float32 scale [rows] by which rows were divided, if any."""

    values: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class AdapterStart:
    """The start of an accumulator: low [M, rank] times the transpose of up [C, rank], where `bits`,
    a packed dropout mask of that output, keeps it."""

    low: AdapterOperand
    up: AdapterOperand
    bits: Tensor | None = None


def adapter_operands(
    factors: Sequence[AdapterFactors],
    dtype: torch.dtype,
    result: torch.dtype,
    factor: float = 1.0,
) -> list[AdapterStart]:
    """Return the start for each of `factors`. factor: multiplies all sums of `low`.

    dtype: the dtype of the adapter's product. Float32 factors become float16 relative to each row's
    largest element: one half with 11 bits for a `result` in bfloat16, which has 8, and a second
    half as well for a `result` in float16, which has 11.
    """
    return launched_together(
        factors, _operand_key, lambda alike: _operands(alike, dtype, result, factor)
    )


def _operand_key(factors: AdapterFactors) -> Hashable:
    low, up, total = factors.low, factors.up, factors.total
    kept = None if total is None else (total.dtype, total.stride())
    scaled = factors.scaling is None
    return low.dtype, low.shape, low.stride(), up.dtype, up.stride(), scaled, kept


def _operands(
    factors: Sequence[AdapterFactors], dtype: torch.dtype, result: torch.dtype, factor: float
) -> list[AdapterStart]:
    low, up, total = factors[0].low, factors[0].up, factors[0].total
    splits, rows, rank = low.shape
    normalized = dtype == torch.float32
    terms, width = adapter_terms(dtype, result), adapter_width(rank, dtype, result)
    out_dtype = torch.float16 if normalized else dtype

    def empty(count: int) -> AdapterOperand:
        scale = low.new_empty(count, dtype=torch.float32) if normalized else None
        return AdapterOperand(low.new_empty(count, width, dtype=out_dtype), scale)

    starts = [AdapterStart(empty(rows), empty(len(each.up)), each.bits) for each in factors]
    block = 16
    arguments = {
        "lows": tuple(each.low for each in factors),
        "low_stride_split": low.stride(0),
        "low_stride_row": low.stride(1),
        "low_stride_rank": low.stride(2),
        "scalings": all_or_none(each.scaling for each in factors),
        "factor": factor,
        "low_outs": tuple(each.low.values for each in starts),
        "low_scales": all_or_none(each.low.scale for each in starts),
        "totals": all_or_none(each.total for each in factors),
        "total_stride": 0 if total is None else total.stride(0),
        "rows": rows,
        "ups": tuple(each.up for each in factors),
        "up_stride_row": up.stride(0),
        "up_stride_rank": up.stride(1),
        "up_outs": tuple(each.up.values for each in starts),
        "up_scales": all_or_none(each.up.scale for each in starts),
        "columns": tuple(len(each.up) for each in factors),
        "rank": rank,
        "width": width,
    }
    constexprs = {
        "OUT": TRITON_DTYPES[out_dtype],
        "PARTS": len(factors),
        "SPLITS": splits,
        "TERMS": terms,
        "ROWS": block,
        "BRANK": padded(rank),
    }
    most = max(len(each.up) for each in factors)
    grid = (-(-rows // block) + -(-most // block), len(factors))
    Launch(adapter_operand_kernel, grid, arguments, constexprs).run()
    return starts
