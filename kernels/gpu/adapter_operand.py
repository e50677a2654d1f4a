"""Makes the thin factors of an adapter 16-bit, as tensor cores take them, and no less accurate than
the result."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.parts import pick


# fmt: off
@triton.jit
def _operand(
    planes, stride_split, stride_row, stride_rank, scaling, factor, out, scale, total, total_stride,
    tile, rows, rank, width,
    OUT: tl.constexpr, SPLITS: tl.constexpr, TERMS: tl.constexpr, UP: tl.constexpr,
    ROWS: tl.constexpr, BRANK: tl.constexpr,
):
    # fmt: on
    """Write rows tile * ROWS … of out [rows, width]: the sum of SPLITS `planes` times `factor` and,
    unless `scaling` is None, times the number at `scaling`."""
    at = tile * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, BRANK)
    inside = (at < rows)[:, None] & (ranks < rank)[None, :]
    base = planes + tl.cast(at, tl.int64)[:, None] * stride_row + ranks[None, :] * stride_rank
    values = tl.zeros((ROWS, BRANK), tl.float32)
    for split in tl.static_range(SPLITS):
        values += tl.load(base + split * stride_split, mask=inside, other=0.0).to(tl.float32)
    if scaling is not None:
        values *= tl.load(scaling) * factor
    if total is not None:
        place = tl.cast(at, tl.int64)[:, None] * total_stride + ranks[None, :]
        tl.store(total + place, values.to(total.dtype.element_ty), mask=inside)
    if scale is not None:
        largest = tl.maximum(tl.max(tl.abs(values), axis=1), 1e-30)
        tl.store(scale + at, largest, mask=at < rows)
        values = values / largest[:, None]
    high = values.to(OUT)
    target = out + tl.cast(at, tl.int64)[:, None] * width + ranks[None, :]
    if TERMS == 1:
        tl.store(target, high, mask=(at < rows)[:, None] & (ranks < width)[None, :])
    else:
        low = (values - high.to(tl.float32)).to(OUT)
        tl.store(target, high, mask=inside)
        tl.store(target + rank, high if UP else low, mask=inside)
        tl.store(target + 2 * rank, low if UP else high, mask=inside)
        padding = (at < rows)[:, None] & (3 * rank + ranks < width)[None, :]
        tl.store(target + 3 * rank, tl.zeros_like(high), mask=padding)


# fmt: off
@triton.jit
def adapter_operand_kernel(
    lows, low_stride_split, low_stride_row, low_stride_rank, scalings, factor, low_outs, low_scales,
    totals, total_stride, rows, ups, up_stride_row, up_stride_rank, up_outs, up_scales, columns,
    rank, width,
    OUT: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, TERMS: tl.constexpr,
    ROWS: tl.constexpr, BRANK: tl.constexpr,
):
    # fmt: on
    """Write low_out [rows, width] of OUT, from the sum of SPLITS planes of low, each [rows, rank],
    times the number at `scaling` and `factor`; and up_out [columns, width] from up [columns, rank].

    Arguments with plural names are tuples of PARTS, or None. With scales [rows] and [columns],
    float32, rows are divided by their largest magnitude, which is written to the scales, so that
    float16 holds 11 bits of every element that matters. TERMS 1: width is the rank padded with
    zeros. TERMS 3: low_out is [high | low | high] and up_out [high | high | low], so that their
    product has the three largest of the four products of their halves. total [rows, rank], of any
    dtype: receives the scaled sum, or None.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles = tl.cdiv(rows, ROWS)
    if tile < tiles:
        scaling = None
        if scalings is not None:
            scaling = pick(scalings, part, PARTS)
        scale = None
        if low_scales is not None:
            scale = pick(low_scales, part, PARTS)
        total = None
        if totals is not None:
            total = pick(totals, part, PARTS)
        _operand(
            pick(lows, part, PARTS), low_stride_split, low_stride_row, low_stride_rank,
            scaling, factor, pick(low_outs, part, PARTS), scale, total, total_stride,
            tile, rows, rank, width, OUT, SPLITS, TERMS, False, ROWS, BRANK,
        )  # fmt: skip
    else:
        column_scale = None
        if up_scales is not None:
            column_scale = pick(up_scales, part, PARTS)
        _operand(
            pick(ups, part, PARTS), 0, up_stride_row, up_stride_rank,
            None, 1.0, pick(up_outs, part, PARTS), column_scale, None, 0,
            tile - tiles, pick(columns, part, PARTS), rank, width,
            OUT, 1, TERMS, True, ROWS, BRANK,
        )  # fmt: skip
