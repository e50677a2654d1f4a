"""The start of the accumulator: the adapter's product, before the loop over W."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.philox import is_kept
from qlora_compile.kernels.gpu.weight import edge


# fmt: off
@triton.jit
def adapter_start(
    low, low_scale, up, up_scale, bits, m0, c0, M, C, width,
    BM: tl.constexpr, BC: tl.constexpr, BWIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr, EVEN_C: tl.constexpr,
):
    # fmt: on
    """Return a tile [BM, BC], with WEIGHT_LEFT its transpose, of the float32 product
    (low [M, width] @ up [C, width]ᵀ) ⊙ (low_scale [M] up_scale [C]ᵀ), zero where dropout drops.

    low, up: 16-bit, as `adapter_operand_kernel` writes them; scales: float32, or both None. width:
    a multiple of BWIDTH, CHUNKS times.
    """
    rows = edge(m0, M, BM, False)
    columns = edge(c0, C, BC, EVEN_C)
    low_tile = low + tl.cast(m0, tl.int64) * width + rows[:, None] * width
    up_tile = up + tl.cast(c0, tl.int64) * width + columns[:, None] * width
    acc = tl.zeros((BC, BM), tl.float32) if WEIGHT_LEFT else tl.zeros((BM, BC), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        if chunk > 0:
            # The next chunk's loads would otherwise rise above this product, into spills.
            tl.debug_barrier()
        at = (chunk * BWIDTH + tl.arange(0, BWIDTH))[None, :]
        lows = tl.load(low_tile + at)
        ups = tl.load(up_tile + at)
        acc = tl.dot(ups, lows.T, acc) if WEIGHT_LEFT else tl.dot(lows, ups.T, acc)
    if low_scale is not None:
        row_scale = tl.load(low_scale + m0 + rows)
        column_scale = tl.load(up_scale + c0 + columns)
        if WEIGHT_LEFT:
            acc = acc * column_scale[:, None] * row_scale[None, :]
        else:
            acc = acc * row_scale[:, None] * column_scale[None, :]
    if bits is not None:
        at = c0 + columns
        if WEIGHT_LEFT:
            acc = tl.where(is_kept(bits, m0, rows[None, :], at[:, None], C, True), acc, 0.0)
        else:
            acc = tl.where(is_kept(bits, m0, rows[:, None], at[None, :], C, True), acc, 0.0)
    return acc
