"""Launches of the thin products, the dropout mask and the standalone dequantisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.dropout import LANES, ROUNDS, dropout_threshold
from qlora_compile.kernels.gpu.adapter_gradient import adapter_gradient_kernel
from qlora_compile.kernels.gpu.adapter_operand import adapter_operand_kernel
from qlora_compile.kernels.gpu.configs import adapter_terms, adapter_width
from qlora_compile.kernels.gpu.dequantize import dequantize_kernel
from qlora_compile.kernels.gpu.launch import TRITON_DTYPES, Launch, with_contiguous_rows
from qlora_compile.kernels.gpu.low_rank import low_rank_kernel
from qlora_compile.kernels.gpu.packed_operand import packed_operand
from qlora_compile.kernels.gpu.philox import keep_bits_kernel
from qlora_compile.kernels.variants.base import LinearSpec
from qlora_compile.kernels.workspace import workspace

_PROGRAMS = 256
"""Programs that fill any of today's cards about twice over."""


def keep_bits(seed: Tensor, spec: LinearSpec, rows: int) -> Tensor:
    """The dropout mask of the adapter's input [rows, K], packed: uint8 [rows * K / 8]."""
    count, size = rows * spec.k // LANES, 1024
    bits = torch.empty(count, dtype=torch.uint8, device=seed.device)
    arguments = {
        "seed": seed,
        # Triton's JIT takes no argument named "stream".
        "subsequence": spec.stream,
        "threshold": dropout_threshold(spec.dropout),
        "bits": bits,
        "count": count,
    }
    constexprs = {"SIZE": size, "ROUNDS": ROUNDS}
    Launch(keep_bits_kernel, (-(-count // size),), arguments, constexprs).run()
    return bits


def low_rank(x: Tensor, factor: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Tensor:
    """drop(x) [M, K] @ factor [rank, K]ᵀ, the product in `dtype`. Dropout only sets elements to
    zero here: the division by the probability of keeping one is left to the caller.

    As float32 planes [splits, M, rank], to be added up: parts of one sum.
    """
    x = with_contiguous_rows(x)
    (rows, k), rank = x.shape, factor.shape[0]
    block_m, block_k, block_rank = 64, 64, _rank_block(rank, x.dtype)
    grid = (-(-rows // block_m), -(-rank // block_rank))
    splits = _splits(grid[0] * grid[1], -(-k // block_k))
    out = x.new_empty(splits, rows, rank, dtype=torch.float32)
    arguments = {
        "x": x,
        "x_stride": x.stride(0),
        "factor": factor,
        "factor_stride_r": factor.stride(0),
        "factor_stride_k": factor.stride(1),
        "bits": bits,
        "out": out,
        "out_stride_split": out.stride(0),
        "M": rows,
        "K": k,
        "rank": rank,
    }
    constexprs = {
        "LORA": TRITON_DTYPES[dtype],
        "BM": block_m,
        "BK": block_k,
        "BRANK": block_rank,
        "SPLITS": splits,
        "EVEN_K": k % block_k == 0,
    }
    Launch(low_rank_kernel, (*grid, splits), arguments, constexprs, num_warps=8).run()
    return out


def added_up(planes: Tensor) -> Tensor:
    """The sum of the first dimension, in a fixed order, without a launch where it has one plane."""
    return planes[0] if planes.shape[0] == 1 else planes.sum(0)


@dataclass(frozen=True)
class AdapterOperand:
    """A thin factor for tensor cores: values [rows, width], 16-bit, width a multiple of 16, and the
    float32 scale [rows] its rows were divided by, if they were."""

    values: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class AdapterStart:
    """What an accumulator starts at: low [M, rank] times up [C, rank], transposed, where `bits`, a
    packed dropout mask of that output, keeps it."""

    low: AdapterOperand
    up: AdapterOperand
    bits: Tensor | None = None


def adapter_operands(
    low: Tensor,
    up: Tensor,
    dtype: torch.dtype,
    result: torch.dtype,
    *,
    scaling: Tensor | None = None,
    factor: float = 1.0,
    total: bool = False,
    bits: Tensor | None = None,
) -> tuple[AdapterStart, Tensor | None]:
    """(the start, float32 sum [M, rank] of `low` if `total`) of low [planes, M, rank] and up
    [C, rank], any strides. scaling: one float32 element that, times `factor`, multiplies the sum.

    dtype: of the adapter's product. A float32 one becomes float16 relative to each row's largest
    element: 11 bits where the `result` is rounded to bfloat16's 8; to float16's 11, a second half
    as well.
    """
    (splits, rows, rank), columns = low.shape, up.shape[0]
    normalized = dtype == torch.float32
    terms, width = adapter_terms(dtype, result), adapter_width(rank, dtype, result)
    out_dtype = torch.float16 if normalized else dtype

    def empty(count: int) -> AdapterOperand:
        scale = low.new_empty(count, dtype=torch.float32) if normalized else None
        return AdapterOperand(low.new_empty(count, width, dtype=out_dtype), scale)

    start = AdapterStart(empty(rows), empty(columns), bits)
    summed = low.new_empty(rows, rank, dtype=torch.float32) if total else None
    block = 16
    arguments = {
        "low": low,
        "low_stride_split": low.stride(0),
        "low_stride_row": low.stride(1),
        "low_stride_rank": low.stride(2),
        "scaling": scaling,
        "factor": factor,
        "low_out": start.low.values,
        "low_scale": start.low.scale,
        "total": summed,
        "rows": rows,
        "up": up,
        "up_stride_row": up.stride(0),
        "up_stride_rank": up.stride(1),
        "up_out": start.up.values,
        "up_scale": start.up.scale,
        "columns": columns,
        "rank": rank,
        "width": width,
    }
    constexprs = {
        "OUT": TRITON_DTYPES[out_dtype],
        "SPLITS": splits,
        "TERMS": terms,
        "ROWS": block,
        "BRANK": _padded(rank),
    }
    grid = (-(-rows // block) + -(-columns // block),)
    Launch(adapter_operand_kernel, grid, arguments, constexprs).run()
    return start, summed


def adapter_gradient(
    z: Tensor, low: Tensor, dtype: torch.dtype, out: Tensor, bits: Tensor | None = None
) -> None:
    """out [C, rank] (any strides and dtype) = drop(z) [M, C]ᵀ @ low [M, rank], product in `dtype`.

    Partial sums are float32 and added in a fixed order: the same bits every time.
    """
    z = with_contiguous_rows(z)
    # Of siblings it is some columns of a wider one.
    low = low.contiguous()
    (rows, columns), rank = z.shape, low.shape[1]
    block_m, block_c, block_rank = 64, 64, _rank_block(rank, z.dtype)
    grid = (-(-columns // block_c), -(-rank // block_rank))
    splits = _splits(grid[0] * grid[1], -(-rows // block_m))
    whole = splits == 1 and out.dtype == torch.float32
    parts = out[None] if whole else z.new_empty(splits, columns, rank, dtype=torch.float32)
    arguments = {
        "z": z,
        "z_stride": z.stride(0),
        "low": low,
        "bits": bits,
        "out": parts,
        "out_stride_split": parts.stride(0),
        "out_stride_c": parts.stride(1),
        "out_stride_r": parts.stride(2),
        "M": rows,
        "C": columns,
        "rank": rank,
    }
    constexprs = {
        "LORA": TRITON_DTYPES[dtype],
        "BM": block_m,
        "BC": block_c,
        "BRANK": block_rank,
        "SPLITS": splits,
        "EVEN_C": columns % block_c == 0,
    }
    Launch(adapter_gradient_kernel, (*grid, splits), arguments, constexprs, num_warps=8).run()
    if not whole:
        out.copy_(added_up(parts))


def dequantize(
    planes: Sequence[Tensor],
    spec: LinearSpec,
    dtype: torch.dtype,
    decoder: str,
    up: Tensor | None = None,
    scaling: Tensor | None = None,
) -> Tensor:
    """W [N, K] in `dtype`, or [W | scaling * up] [N, K + rank] with up [N, rank] and scaling one
    float32 element; in the workspace."""
    tile_rows, tile_columns = 32, 256
    rank = 0 if up is None else up.shape[1]
    packed = packed_operand(spec.layout, planes, decoder, dtype, tile_columns)
    out = workspace(spec.n, spec.k + rank, dtype=dtype, device=packed.weight.device)
    arguments = {
        **packed.arguments,
        "codes": packed.weight,
        "up": None if up is None else up.contiguous(),
        "scaling": scaling,
        "out": out,
        "out_stride": out.stride(0),
        "N": spec.n,
        "K": spec.k,
        "rank": rank,
    }
    constexprs = {
        **packed.constexprs,
        "DTYPE": TRITON_DTYPES[dtype],
        "ROWS": tile_rows,
        "COLUMNS": tile_columns,
        "EVEN_N": spec.n % tile_rows == 0,
        "EVEN_K": spec.k % tile_columns == 0,
    }
    grid = (-(-spec.n // tile_rows), -(-spec.k // tile_columns) + -(-rank // tile_columns))
    Launch(dequantize_kernel, grid, arguments, constexprs).run()
    return out


def _rank_block(rank: int, x_dtype: torch.dtype) -> int:
    """Ranks a program takes: with more, the halves of a float32 factor, and of a float16 x, spill
    registers."""
    return min(16 if x_dtype == torch.float16 else 32, _padded(rank))


def _padded(rank: int) -> int:
    """The tensor cores' 16, or the next power of two."""
    return max(16, 1 << (rank - 1).bit_length())


def _splits(programs: int, steps: int) -> int:
    """Into how many parts a reduction of `steps` is cut so that the programs fill a card.

    A power of two, as the kernels are compiled for each: row counts of one bucket need one or two.
    """
    most = max(1, min(_PROGRAMS // max(programs, 1), steps // 4))
    return 1 << (most.bit_length() - 1)
