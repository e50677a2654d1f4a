"""The thin products of an adapter: x Aᵀ and dY B, a few columns out of a long reduction."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.philox import is_kept
from qlora_compile.kernels.gpu.weight import edge
from qlora_compile.kernels.gpu.wide_dot import dot_float32_right


# fmt: off
@triton.jit
def low_rank_kernel(
    x, x_stride, factor, factor_stride_r, factor_stride_k, bits, out, out_stride_split,
    M, K, rank,
    LORA: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BRANK: tl.constexpr,
    SPLITS: tl.constexpr, EVEN_K: tl.constexpr,
):
    # fmt: on
    """out [SPLITS, M, rank], float32: parts of drop(x) [M, K] @ factor [rank, K]ᵀ.

    The product runs in LORA; float32 keeps every bit of the factor against a 16-bit x.
    """
    m0 = tl.program_id(0) * BM
    r0 = tl.program_id(1) * BRANK
    split = tl.program_id(2)
    rows = edge(m0, M, BM, False)
    ranks = r0 + tl.arange(0, BRANK)
    x_tile = x + tl.cast(m0, tl.int64) * x_stride + rows[:, None] * x_stride
    acc = tl.zeros((BM, BRANK), tl.float32)
    steps = tl.cdiv(K, BK)
    part = tl.cdiv(steps, SPLITS)
    for step in range(split * part, tl.minimum(split * part + part, steps)):
        columns = step * BK + tl.arange(0, BK)
        inside = columns < K
        if EVEN_K:
            xs = tl.load(x_tile + columns[None, :])
        else:
            xs = tl.load(x_tile + columns[None, :], mask=inside[None, :], other=0.0)
        if bits is not None:
            keep = is_kept(bits, m0, rows[:, None], columns[None, :], K, inside[None, :])
            xs = tl.where(keep, xs, 0.0).to(xs.dtype)
        fs = tl.load(
            factor
            + ranks[None, :] * factor_stride_r
            + columns[:, None].to(tl.int64) * factor_stride_k,
            mask=inside[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        if tl.float32 == LORA:
            acc = dot_float32_right(xs, fs.to(tl.float32), acc)
        else:
            acc = tl.dot(xs.to(LORA), fs.to(LORA), acc)
    target = out + tl.cast(split, tl.int64) * out_stride_split + tl.cast(m0, tl.int64) * rank
    target = target + (tl.arange(0, BM)[:, None] * rank + ranks[None, :])
    stored = (m0 + tl.arange(0, BM) < M)[:, None] & (ranks < rank)[None, :]
    tl.store(target, acc, mask=stored)
