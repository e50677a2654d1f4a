"""The absmax of blocks on the device: read for a tile, or, doubly quantised, decoded once."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_compile.kernels.gpu.decoders import Side
from qlora_compile.kernels.gpu.launch import Launch
from qlora_compile.kernels.gpu.weight import edge


class BlockSide(NamedTuple):
    """What kernels read beside the codes; None for what is missing. tables: the decoder's.
    row_blocks: the number of blocks in a row, None if blocks do not begin with rows."""

    absmax: Tensor
    nested_codebook: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    tables: Tensor | None
    row_blocks: int | None


def block_side(
    scales: Sequence[Tensor],
    k: int,
    block_size: int,
    tile_columns: int,
    tables: Tensor | None,
    divisor: float,
) -> Side:
    """Return the Side of the absmax planes `scales` of a weight with k columns. K is a multiple of
    8.

    A scale serves the longest runs of columns that lie in one block, wherever a tile begins.
    """
    absmax, *nested = scales
    by_row = block_size == k
    group = tile_columns if by_row else math.gcd(k, block_size, tile_columns)
    row_blocks = None if k % block_size else k // block_size
    codebook, nested_absmax, offset = nested or (None, None, None)
    side = BlockSide(absmax, codebook, nested_absmax, offset, tables, row_blocks)
    shift = -1 if by_row else block_size.bit_length() - 1
    return Side(side, (shift, group, divisor), looks_up=bool(nested))


@triton.jit
def loaded_offset(side):
    """Return the nested offset, zero where there is none."""
    offset = 0.0
    if side.nested_offset is not None:
        offset = tl.load(side.nested_offset)
    return offset


# fmt: off
@triton.jit
def load_absmax(
    side, n0, k0, N, K,
    SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):
    # fmt: on
    """Return the absmax of each run of GROUP columns and, doubly quantised, the absmax of its 256.

    SIDE: BLOCK_SHIFT, log2 of the block size, -1 for one block a row; GROUP; and the divisor. Each
    is [ROWS] where a row of the tile is one run, else [ROWS, COLUMNS / GROUP].
    """
    BLOCK_SHIFT: tl.constexpr = SIDE[0]
    GROUP: tl.constexpr = SIDE[1]
    rows = edge(n0, N, ROWS, EVEN_N)
    if COLUMNS == GROUP:
        # One-dimensional until the scales meet the words: a column of its own would get a layout
        # of its own, and the words would be moved to it.
        index = n0 + rows
        columns = k0
    else:
        index = (n0 + rows)[:, None]
        columns = (k0 + tl.arange(0, COLUMNS // GROUP) * GROUP)[None, :]
    if not EVEN_K:
        columns = tl.minimum(columns, K - 1)
    if BLOCK_SHIFT >= 0:
        if side.row_blocks is None:
            index = ((index.to(tl.int64) * K + columns) >> BLOCK_SHIFT).to(tl.int32)
        else:
            index = index * side.row_blocks + (columns >> BLOCK_SHIFT)
    values = tl.load(side.absmax + index)
    nested = values
    if side.nested_absmax is not None:
        nested = tl.load(side.nested_absmax + (index >> 8))
    return values, nested


@triton.jit
def scales_of(loaded, side, state, SIDE: tl.constexpr):
    """Return float32 scales from the result of `load_absmax`: absmax over the divisor."""
    DIVISOR: tl.constexpr = SIDE[2]
    scales = loaded[0]
    if side.nested_codebook is not None:
        scales = tl.load(side.nested_codebook + scales.to(tl.int32)) * loaded[1] + state[0]
    if DIVISOR != 1:
        scales = tl.div_rn(scales, DIVISOR)
    return scales


@triton.jit
def absmax_kernel(
    codes, nested_codebook, nested_absmax, nested_offset, out, blocks, SIZE: tl.constexpr
):
    """Write nested_codebook[codes] * nested_absmax[b // 256] + nested_offset to float32 out
    [blocks]."""
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = index < blocks
    values = tl.load(nested_codebook + tl.load(codes + index, mask=inside, other=0).to(tl.int32))
    nested = tl.load(nested_absmax + (index >> 8), mask=inside, other=0.0)
    tl.store(out + index, values * nested + tl.load(nested_offset), mask=inside)


def decoded_absmax(
    quantized: Tensor, nested_codebook: Tensor, nested_absmax: Tensor, nested_offset: Tensor
) -> Tensor:
    """Return the absmax of every block, float32, for a kernel that reads each value many times."""
    blocks, size = quantized.numel(), 1024
    out = torch.empty(blocks, dtype=torch.float32, device=quantized.device)
    arguments = {
        "codes": quantized,
        "nested_codebook": nested_codebook,
        "nested_absmax": nested_absmax,
        "nested_offset": nested_offset,
        "out": out,
        "blocks": blocks,
    }
    Launch(absmax_kernel, (-(-blocks // size),), arguments, {"SIZE": size}).run()
    return out
