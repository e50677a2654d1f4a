"""The gradients of an adapter: dA = (s dY B)ᵀ drop(x) and dB = dYᵀ (s drop(x) Aᵀ)."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.parts import pick
from qlora_compile.kernels.gpu.philox import is_kept
from qlora_compile.kernels.gpu.wide_dot import dot_float32_right


# fmt: off
@triton.jit
def adapter_gradient_kernel(
    zs, z_strides, lows, low_strides, bits, outs, out_strides_split, out_strides,
    M, Cs, rank,
    LORA: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BRANK: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, EVEN_C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    # fmt: on
    """Write parts of drop(z) [M, C]ᵀ @ low [M, rank] to float32 out [SPLITS, C, rank], or
    [SPLITS, rank, C] if TRANSPOSED.

    All but M and rank are tuples of PARTS, bits None without dropout; out_strides: of the last
    dimension but one. A part has BLOCKS programs for its ranks. The product runs in LORA; float32
    keeps every bit of `low` against a 16-bit z.
    """
    c0 = tl.program_id(0) * BC
    part = tl.program_id(1) // BLOCKS
    r0 = tl.program_id(1) % BLOCKS * BRANK
    split = tl.program_id(2)
    z = pick(zs, part, PARTS)
    z_stride = pick(z_strides, part, PARTS)
    low = pick(lows, part, PARTS)
    low_stride = pick(low_strides, part, PARTS)
    C = pick(Cs, part, PARTS)
    columns = c0 + tl.arange(0, BC)
    ranks = r0 + tl.arange(0, BRANK)
    acc = tl.zeros((BC, BRANK), tl.float32)
    steps = tl.cdiv(M, BM)
    share = tl.cdiv(steps, SPLITS)
    last = tl.minimum(split * share + share, steps)
    if PARTS > 1:
        # This part has fewer columns than another.
        last = tl.where(c0 < C, last, 0)
    for step in range(split * share, last):
        m0 = step * BM
        inside = m0 + tl.arange(0, BM) < M
        rows = tl.cast(m0, tl.int64) + tl.arange(0, BM)
        loaded = inside[:, None]
        if not EVEN_C:
            loaded = loaded & (columns < C)[None, :]
        values = tl.load(z + rows[:, None] * z_stride + columns[None, :], mask=loaded, other=0.0)
        if bits is not None:
            kept_bits = pick(bits, part, PARTS)
            keep = is_kept(kept_bits, m0, tl.arange(0, BM)[:, None], columns[None, :], C, loaded)
            values = tl.where(keep, values, 0.0).to(values.dtype)
        ls = tl.load(
            low + rows[:, None] * low_stride + ranks[None, :],
            mask=inside[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        if tl.float32 == LORA:
            acc = dot_float32_right(values.T, ls, acc)
        else:
            acc = tl.dot(values.to(LORA).T, ls.to(LORA), acc)
    target = pick(outs, part, PARTS)
    target += tl.cast(split, tl.int64) * pick(out_strides_split, part, PARTS)
    out_stride = pick(out_strides, part, PARTS)
    if TRANSPOSED:
        target = target + columns[:, None] + ranks[None, :] * out_stride
    else:
        target = target + columns[:, None] * out_stride + ranks[None, :]
    stored = (columns < C)[:, None] & (ranks < rank)[None, :]
    tl.store(target, acc, mask=stored)


# fmt: off
@triton.jit
def add_up_kernel(
    planes, splits, outs, counts, PARTS: tl.constexpr, SIZE: tl.constexpr,
):
    # fmt: on
    """Write the sum of planes [splits, count], float32, in their order, cast, to out [count].

    All four are tuples of PARTS; outs of one dtype.
    """
    part = tl.program_id(1)
    count = pick(counts, part, PARTS)
    source = pick(planes, part, PARTS)
    at = tl.cast(tl.program_id(0), tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    total = tl.zeros((SIZE,), tl.float32)
    for split in range(pick(splits, part, PARTS)):
        total += tl.load(source + tl.cast(split, tl.int64) * count + at, mask=inside, other=0.0)
    out = pick(outs, part, PARTS)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
