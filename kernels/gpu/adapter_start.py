"""Where the accumulator starts: the adapter's product, before the loop over W."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.philox import kept
from qlora_compile.kernels.gpu.weight import edge
from qlora_compile.kernels.gpu.wide_dot import dot_float32


@triton.jit
def adapter_start(
    low,
    up,
    up_stride_c,
    up_stride_r,
    bits,
    m0,
    c0,
    M,
    C,
    rank,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BRANK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LORA: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    EVEN_C: tl.constexpr,
):
    """float32 low [M, rank] @ up [C, rank]ᵀ, zero where dropout took the element: its tile
    [BM, BC], or that tile's transpose with WEIGHT_LEFT."""
    rows = edge(m0, M, BM, False)
    columns = edge(c0, C, BC, EVEN_C)
    low_base = low + tl.cast(m0, tl.int64) * rank
    up_base = up + tl.cast(c0, tl.int64) * up_stride_c
    acc = tl.zeros((BC, BM), tl.float32) if WEIGHT_LEFT else tl.zeros((BM, BC), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        if chunk > 0:
            # The next chunk's loads would otherwise rise above this product, into spills.
            tl.debug_barrier()
        ranks = chunk * BRANK + tl.arange(0, BRANK)
        inside = ranks < rank
        if WEIGHT_LEFT:
            left = tl.load(
                up_base + (columns[:, None] * up_stride_c + ranks[None, :] * up_stride_r),
                mask=inside[None, :],
                other=0.0,
            )
            right = tl.load(
                low_base + (ranks[:, None] + rows[None, :] * rank), mask=inside[:, None], other=0.0
            )
        else:
            left = tl.load(
                low_base + (rows[:, None] * rank + ranks[None, :]), mask=inside[None, :], other=0.0
            )
            right = tl.load(
                up_base + (ranks[:, None] * up_stride_r + columns[None, :] * up_stride_c),
                mask=inside[:, None],
                other=0.0,
            )
        if tl.float32 == LORA:
            acc = dot_float32(left.to(tl.float32), right.to(tl.float32), acc)
        else:
            acc = tl.dot(left.to(LORA), right.to(LORA), acc)
    if bits is not None:
        if WEIGHT_LEFT:
            acc = tl.where(
                kept(bits, m0, rows[None, :], (c0 + columns)[:, None], C, True), acc, 0.0
            )
        else:
            acc = tl.where(
                kept(bits, m0, rows[:, None], (c0 + columns)[None, :], C, True), acc, 0.0
            )
    return acc
