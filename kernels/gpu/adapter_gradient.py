"""The gradients of an adapter: dA = (s dY B)ᵀ drop(x) and dB = dYᵀ (s drop(x) Aᵀ)."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.philox import is_kept
from qlora_compile.kernels.gpu.wide_dot import dot_float32_right


# fmt: off
@triton.jit
def adapter_gradient_kernel(
    z, z_stride, low, bits, out, out_stride_split, out_stride_c, out_stride_r,
    M, C, rank,
    LORA: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BRANK: tl.constexpr,
    SPLITS: tl.constexpr, EVEN_C: tl.constexpr,
):
    # fmt: on
    """out [SPLITS, C, rank] by its strides, float32: parts of drop(z) [M, C]ᵀ @ low [M, rank].

    The product runs in LORA; float32 keeps every bit of `low` against a 16-bit z.
    """
    c0 = tl.program_id(0) * BC
    r0 = tl.program_id(1) * BRANK
    split = tl.program_id(2)
    columns = c0 + tl.arange(0, BC)
    ranks = r0 + tl.arange(0, BRANK)
    acc = tl.zeros((BC, BRANK), tl.float32)
    steps = tl.cdiv(M, BM)
    part = tl.cdiv(steps, SPLITS)
    for step in range(split * part, tl.minimum(split * part + part, steps)):
        m0 = step * BM
        inside = m0 + tl.arange(0, BM) < M
        rows = tl.cast(m0, tl.int64) + tl.arange(0, BM)
        loaded = inside[:, None]
        if not EVEN_C:
            loaded = loaded & (columns < C)[None, :]
        zs = tl.load(z + rows[:, None] * z_stride + columns[None, :], mask=loaded, other=0.0)
        if bits is not None:
            keep = is_kept(bits, m0, tl.arange(0, BM)[:, None], columns[None, :], C, loaded)
            zs = tl.where(keep, zs, 0.0).to(zs.dtype)
        ls = tl.load(
            low + rows[:, None] * rank + ranks[None, :],
            mask=inside[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        if tl.float32 == LORA:
            acc = dot_float32_right(zs.T, ls, acc)
        else:
            acc = tl.dot(zs.to(LORA).T, ls.to(LORA), acc)
    target = out + tl.cast(split, tl.int64) * out_stride_split
    target = target + columns[:, None] * out_stride_c + ranks[None, :] * out_stride_r
    stored = (columns < C)[:, None] & (ranks < rank)[None, :]
    tl.store(target, acc, mask=stored)
