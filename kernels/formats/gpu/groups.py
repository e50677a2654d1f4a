"""Groups on the device: factors read for a tile, and codes decoded with them, exactly.

They implement `load`, `scale` and `decode` of `qlora_compile.kernels.gpu.decoders`. Each factor is
float32 [ROWS, G], one per run of COLUMNS / G weights of a row, or [ROWS] for G = 1. If an index
gives the group of each column, G = COLUMNS. In a word, weight i is the i-th group of bits from the
lowest on.
"""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qlora_compile.kernels.formats.gpu.decode import grouped, join4, join8
from qlora_compile.kernels.gpu.decoders import Side
from qlora_compile.kernels.gpu.weight import edge

_MAGIC = tl.constexpr(8388608.0)
"""2**23: the float32 with these bits and a code in the lowest ones is 2**23 + code."""
_MAGIC_BITS = tl.constexpr(0x4B000000)


class GroupSide(NamedTuple):
    """The factors of groups; zeros (or minima) are None if all are one constant. groups: how many
    factors a row has. whole: a scale of the whole tensor or of each row, for formats with one.
    index: int32 [K], the group of each column; None for groups of neighbours."""

    scales: Tensor
    zeros: Tensor | None
    groups: int
    whole: Tensor | None
    index: Tensor | None


def group_side(
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    group_size: int,
    tile_columns: int,
    *,
    constant: float = 0.0,
    row_shift: int = 0,
    whole: Tensor | None = None,
    whole_shift: int = 31,
    index: Tensor | None = None,
    adds: bool = False,
) -> Side:
    """Return the Side of a weight with k columns, which share factors by groups of `group_size`.

    constant: the zero if there are no `zeros`. row_shift: 2**row_shift rows share factors; 31 if
    all rows do. whole_shift: the same for `whole`. index: int32 [k], the group of each column, if
    groups are not of neighbours. adds: whether `zeros` are minima, to be added to the product.
    """
    by_row = group_size >= k
    run = tile_columns if by_row else math.gcd(group_size, tile_columns)
    if index is not None:
        run = 1
    side = GroupSide(scales, zeros, -(-k // group_size), whole, index)
    shift = -1 if by_row else group_size.bit_length() - 1
    fractional = int(zeros is not None and zeros.is_floating_point()) + adds
    return Side(side, (shift, run, constant, row_shift, fractional, whole_shift))


@triton.jit
def prepare_nothing(side, SIDE: tl.constexpr, PROGRAM: tl.constexpr):
    return 0


# fmt: off
@triton.jit
def load_groups(
    side, n0, k0, N, K,
    SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):
    # fmt: on
    """Return the scale of each run of RUN columns, and its zero if there are any.

    SIDE: SHIFT, log2 of the group size, -1 for one group per row; RUN; the constant zero; log2 of
    the rows that share factors; 1 if zeros may be fractional, 2 if they are minima, else 0; and
    log2 of the rows that share the scale of more than a group. Each result is [ROWS] if a row of
    the tile is one run, else [ROWS, COLUMNS / RUN].
    """
    SHIFT: tl.constexpr = SIDE[0]
    RUN: tl.constexpr = SIDE[1]
    rows = n0 + edge(n0, N, ROWS, EVEN_N)
    if COLUMNS == RUN:
        # One-dimensional until the factors meet the words, as in `load_absmax`.
        columns = k0
    else:
        rows = rows[:, None]
        columns = (k0 + tl.arange(0, COLUMNS // RUN) * RUN)[None, :]
    if not EVEN_K:
        columns = tl.minimum(columns, K - 1)
    index = (rows >> SIDE[3]) * side.groups
    if side.index is not None:
        index += tl.load(side.index + columns)
    else:
        index += (columns >> SHIFT) if SHIFT >= 0 else columns * 0
    scales = tl.load(side.scales + index)
    zeros = scales
    if side.zeros is not None:
        zeros = tl.load(side.zeros + index)
    return scales, zeros


@triton.jit
def integer_factors(loaded, side, state, SIDE: tl.constexpr):
    """Return float32 scales, and what to subtract from 2**23 + code in a first and a second step.

    2**23 + zero is exact for a whole zero, which leaves nothing for the second step. For minima, a
    fourth tensor holds what to add in the end.
    """
    CONSTANT: tl.constexpr = SIDE[2]
    ZEROS: tl.constexpr = SIDE[4]
    scales = loaded[0].to(tl.float32)
    first = tl.full(scales.shape, _MAGIC + CONSTANT, tl.float32)
    second = tl.full(scales.shape, 0.0, tl.float32)
    if ZEROS == 2:
        first = tl.full(scales.shape, _MAGIC, tl.float32)
        factors = (scales, first, second, loaded[1].to(tl.float32))
    else:
        if side.zeros is not None:
            if ZEROS == 1:
                first = tl.full(scales.shape, _MAGIC, tl.float32)
                second = loaded[1].to(tl.float32)
            else:
                first = loaded[1].to(tl.float32) + _MAGIC
        factors = (scales, first, second)
    return factors


@triton.jit
def raised(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Return 2**23 + code as float32."""
    return (((words >> SHIFT) & MASK) | _MAGIC_BITS).to(tl.float32, bitcast=True)


@triton.jit
def with_factors(code, factors, DTYPE: tl.constexpr):
    scaled = ((code - factors[1]) - factors[2]) * factors[0]
    if len(factors) == 4:
        scaled += factors[3]
    return scaled.to(DTYPE)


@triton.jit
def integer_value(words, SHIFT: tl.constexpr, MASK: tl.constexpr, factors, DTYPE: tl.constexpr):
    return with_factors(raised(words, SHIFT, MASK), factors, DTYPE)


@triton.jit
def by_group(words, factors):
    """Return `words` with one row for each group, and the factors as columns."""
    rows, scales = grouped(words, factors[0])
    _, first = grouped(words, factors[1])
    _, second = grouped(words, factors[2])
    if len(factors) == 4:
        _, minima = grouped(words, factors[3])
        found = (scales, first, second, minima)
    else:
        found = (scales, first, second)
    return rows, found


@triton.constexpr_function
def is_of_columns(shape, COLUMNS):
    """Whether factors of this shape belong to columns, and not to runs."""
    return len(shape) == 2 and shape[1] == COLUMNS


# fmt: off
@triton.jit
def decode_nibbles(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode by plain Triton, on every target, without conversions from integers."""
    if is_of_columns(scales[0].shape, COLUMNS):
        codes = join8(
            raised(words, 0, 15),
            raised(words, 4, 15),
            raised(words, 8, 15),
            raised(words, 12, 15),
            raised(words, 16, 15),
            raised(words, 20, 15),
            raised(words, 24, 15),
            raised(words, 28, 15),
        )
        tile = with_factors(tl.reshape(codes, (ROWS, COLUMNS)), scales, DTYPE)
    else:
        words, factors = by_group(words, scales)
        values = join8(
            integer_value(words, 0, 15, factors, DTYPE),
            integer_value(words, 4, 15, factors, DTYPE),
            integer_value(words, 8, 15, factors, DTYPE),
            integer_value(words, 12, 15, factors, DTYPE),
            integer_value(words, 16, 15, factors, DTYPE),
            integer_value(words, 20, 15, factors, DTYPE),
            integer_value(words, 24, 15, factors, DTYPE),
            integer_value(words, 28, 15, factors, DTYPE),
        )
        tile = tl.reshape(values, (ROWS, COLUMNS))
    return tile


# fmt: off
@triton.jit
def decode_bytes(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Do as `decode_nibbles`, for 8-bit codes."""
    if is_of_columns(scales[0].shape, COLUMNS):
        codes = join4(
            raised(words, 0, 255),
            raised(words, 8, 255),
            raised(words, 16, 255),
            raised(words, 24, 255),
        )
        tile = with_factors(tl.reshape(codes, (ROWS, COLUMNS)), scales, DTYPE)
    else:
        words, factors = by_group(words, scales)
        values = join4(
            integer_value(words, 0, 255, factors, DTYPE),
            integer_value(words, 8, 255, factors, DTYPE),
            integer_value(words, 16, 255, factors, DTYPE),
            integer_value(words, 24, 255, factors, DTYPE),
        )
        tile = tl.reshape(values, (ROWS, COLUMNS))
    return tile
