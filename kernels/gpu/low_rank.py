"""The thin products of an adapter: x Aᵀ and dY B, a few columns out of a long reduction."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.parts import pick
from qlora_compile.kernels.gpu.philox import is_kept
from qlora_compile.kernels.gpu.weight import edge
from qlora_compile.kernels.gpu.wide_dot import dot_float32_right


# fmt: off
@triton.jit
def low_rank_kernel(
    xs, x_strides, factors, factor_stride_r, factor_stride_k, bits, out, out_stride_split,
    M, Ks, rank,
    LORA: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BRANK: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, EVEN_K: tl.constexpr,
):
    # fmt: on
    """Write parts of drop(x) [M, K] @ factor [rank, K]ᵀ to float32 out [SPLITS, M, PARTS * rank].

    xs, x_strides, factors, bits, Ks: tuples of PARTS, bits None without dropout. A part has BLOCKS
    programs for its ranks. The product runs in LORA; float32 keeps every bit of the factor against
    a 16-bit x.
    """
    m0 = tl.program_id(0) * BM
    part = tl.program_id(1) // BLOCKS
    r0 = tl.program_id(1) % BLOCKS * BRANK
    split = tl.program_id(2)
    x = pick(xs, part, PARTS)
    x_stride = pick(x_strides, part, PARTS)
    factor = pick(factors, part, PARTS)
    K = pick(Ks, part, PARTS)
    rows = edge(m0, M, BM, False)
    ranks = r0 + tl.arange(0, BRANK)
    x_tile = x + tl.cast(m0, tl.int64) * x_stride + rows[:, None] * x_stride
    acc = tl.zeros((BM, BRANK), tl.float32)
    steps = tl.cdiv(K, BK)
    share = tl.cdiv(steps, SPLITS)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        columns = step * BK + tl.arange(0, BK)
        inside = columns < K
        if EVEN_K:
            values = tl.load(x_tile + columns[None, :])
        else:
            values = tl.load(x_tile + columns[None, :], mask=inside[None, :], other=0.0)
        if bits is not None:
            kept_bits = pick(bits, part, PARTS)
            keep = is_kept(kept_bits, m0, rows[:, None], columns[None, :], K, inside[None, :])
            values = tl.where(keep, values, 0.0).to(values.dtype)
        fs = tl.load(
            factor
            + ranks[None, :] * factor_stride_r
            + columns[:, None].to(tl.int64) * factor_stride_k,
            mask=inside[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        if tl.float32 == LORA:
            acc = dot_float32_right(values, fs.to(tl.float32), acc)
        else:
            acc = tl.dot(values.to(LORA), fs.to(LORA), acc)
    width = PARTS * rank
    target = out + tl.cast(split, tl.int64) * out_stride_split + tl.cast(m0, tl.int64) * width
    target = target + (tl.arange(0, BM)[:, None] * width + (part * rank + ranks)[None, :])
    stored = (m0 + tl.arange(0, BM) < M)[:, None] & (ranks < rank)[None, :]
    tl.store(target, acc, mask=stored)
