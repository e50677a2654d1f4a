"""The GEMM of the fused linear, for the forward or the input gradient: W is dense or decoded in the
loop, and the accumulator starts at the adapter's product."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.adapter_start import adapter_start
from qlora_compile.kernels.gpu.weight import edge, load_dense, load_words


@triton.jit
def weight_tile(n_first, c0, step, BR: tl.constexpr, BACKWARD: tl.constexpr):
    """Return row and column of W where the tile of output columns c0 … and step `step` begins."""
    if BACKWARD:
        n0, k0 = n_first + step * BR, c0
    else:
        n0, k0 = n_first + c0, step * BR
    return n0, k0


# fmt: off
@triton.jit
def load_x(
    x, x_tile, m0, step, reduction,
    BR: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN_R: tl.constexpr,
):
    # fmt: on
    """Return a tile [BM, BR] of x, zero past the end of the reduction."""
    if DESCRIPTOR:
        xs = x.load([m0, step * BR])
    elif EVEN_R:
        xs = tl.load(x_tile + step * BR)
    else:
        inside = step * BR + tl.arange(0, BR) < reduction
        xs = tl.load(x_tile + step * BR, mask=inside[None, :], other=0.0)
    return xs


@triton.jit
def add_product(acc, xs, tile, BACKWARD: tl.constexpr, WEIGHT_LEFT: tl.constexpr):
    """Return acc plus the product of x's tile and W's, transposed with WEIGHT_LEFT."""
    if WEIGHT_LEFT:
        acc = tl.dot(tile.T, xs.T, acc) if BACKWARD else tl.dot(tile, xs.T, acc)
    else:
        acc = tl.dot(xs, tile, acc) if BACKWARD else tl.dot(xs, tile.T, acc)
    return acc


# fmt: off
@triton.jit
def output_tile(
    out, out_stride, m0, c0, end, columns,
    BM: tl.constexpr, BC: tl.constexpr, EVEN_C: tl.constexpr,
):
    # fmt: on
    """Return pointers [BM, BC] to a tile of the output, and the mask of elements to store."""
    cs = tl.arange(0, BC)
    target = out + tl.cast(m0, tl.int64) * out_stride + c0
    target = target + (tl.arange(0, BM)[:, None] * out_stride + cs[None, :])
    stored = (m0 + tl.arange(0, BM) < end)[:, None]
    if not EVEN_C:
        stored = stored & (c0 + cs < columns)[None, :]
    return target, stored


# fmt: off
@triton.jit
def gemm_kernel(
    x, x_stride,
    weight, weight_stride, side, row_words,
    bias, low, low_scale, up, up_scale, bits,
    out, out_stride, out_stride_split,
    M, N, K, width,
    PREPARE: tl.constexpr, LOAD: tl.constexpr, SCALE: tl.constexpr, DECODE: tl.constexpr,
    PROGRAM: tl.constexpr, PER_WORD: tl.constexpr, SIDE: tl.constexpr,
    DTYPE: tl.constexpr, BACKWARD: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BWIDTH: tl.constexpr, CHUNKS: tl.constexpr, GROUP_M: tl.constexpr, SPLITS: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr, DESCRIPTOR: tl.constexpr, PREFETCH: tl.constexpr,
    AHEAD: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Write, forward, out [M, N] = x [M, K] Wᵀ + bias + low upᵀ; backward, out [M, K] = x [M, N] W
    + mask ⊙ low upᵀ, with the scales in low and up.

    weight: int32 words of the packed codes, or W itself if DECODE is None. side, PREPARE … SIDE: as
    `packed_operand` returns them. low … up_scale: as `adapter_start` takes them, with C the
    output's columns. x: a tensor with row stride, or with DESCRIPTOR a tensor descriptor of tiles
    [BM, BR]. With SPLITS > 1 each of SPLITS programs sums a part of the reduction into its own
    float32 plane of out. ACCUMULATE: out's own values are added.

    The decoded tile is carried: tile k + 1 is decoded after the product with tile k was issued, so
    that the two overlap; with PREFETCH the tile's words are loaded yet another iteration earlier.
    """
    if BACKWARD:
        columns, reduction = K, N
        EVEN_C: tl.constexpr = EVEN_K
        EVEN_R: tl.constexpr = EVEN_N
        ROWS: tl.constexpr = BR
        COLUMNS: tl.constexpr = BC
    else:
        columns, reduction = N, K
        EVEN_C: tl.constexpr = EVEN_N
        EVEN_R: tl.constexpr = EVEN_K
        ROWS: tl.constexpr = BC
        COLUMNS: tl.constexpr = BR
    pid = tl.program_id(0)
    split = tl.program_id(1)
    # Programs of a group share their columns of W and their rows of x in the second-level cache.
    across = tl.cdiv(columns, BC)
    group = pid // (GROUP_M * across)
    height = tl.minimum(tl.cdiv(M, BM) - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * across)
    m0 = (group * GROUP_M + within % height) * BM
    c0 = (within // height) * BC

    acc = tl.zeros((BC, BM), tl.float32) if WEIGHT_LEFT else tl.zeros((BM, BC), tl.float32)
    if low is not None:
        # Before the loop: after it, the adapter's product would serialise the loop's last ones. A
        # branch around it would serialise them all; only the first split adds more than zeros.
        acc = adapter_start(
            low, low_scale, up, up_scale, bits, m0, c0, M, columns, width,
            BM, BC, BWIDTH, CHUNKS, WEIGHT_LEFT, EVEN_C,
        )
        if SPLITS > 1:
            acc = tl.where(split == 0, acc, 0.0)

    steps = tl.cdiv(reduction, BR)
    first = 0
    last = steps
    if SPLITS > 1:
        part = tl.cdiv(steps, SPLITS)
        first = split * part
        last = tl.minimum(first + part, steps)
    rows = edge(m0, M, BM, False)
    x_tile = x
    if not DESCRIPTOR:
        x_tile = x + tl.cast(m0, tl.int64) * x_stride + rows[:, None] * x_stride
        x_tile += tl.arange(0, BR)[None, :]

    if DECODE is not None:
        state = PREPARE(side, SIDE, PROGRAM)
        # A tile's side is loaded AHEAD iterations before the tile is decoded, so that what SCALE
        # looks up is loaded one iteration after what points to it.
        at = tl.minimum(first, steps - 1)
        n0, k0 = weight_tile(0, c0, at, BR, BACKWARD)
        words = load_words(weight, n0, k0, N, row_words, ROWS, COLUMNS, PER_WORD, EVEN_N, EVEN_K)
        loaded = LOAD(side, n0, k0, N, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)
        scales = SCALE(loaded, side, state, SIDE)
        tile = DECODE(words, scales, state, PROGRAM, DTYPE, ROWS, COLUMNS)
        n0, k0 = weight_tile(0, c0, tl.minimum(first + 1, steps - 1), BR, BACKWARD)
        if PREFETCH:
            words = load_words(
                weight, n0, k0, N, row_words, ROWS, COLUMNS, PER_WORD, EVEN_N, EVEN_K
            )
        if AHEAD > 0:
            loaded = LOAD(side, n0, k0, N, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)
        if AHEAD == 2:
            scales = SCALE(loaded, side, state, SIDE)
            n0, k0 = weight_tile(0, c0, tl.minimum(first + 2, steps - 1), BR, BACKWARD)
            loaded = LOAD(side, n0, k0, N, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)

    for step in tl.range(first, last, num_stages=STAGES):
        xs = load_x(x, x_tile, m0, step, reduction, BR, DESCRIPTOR, EVEN_R).to(DTYPE)
        if DECODE is None:
            n0, k0 = weight_tile(0, c0, step, BR, BACKWARD)
            tile = load_dense(weight, weight_stride, n0, k0, N, K, ROWS, COLUMNS, EVEN_N, EVEN_K)
        else:
            n0, k0 = weight_tile(0, c0, tl.minimum(step + 1 + PREFETCH, steps - 1), BR, BACKWARD)
            next_words = load_words(
                weight, n0, k0, N, row_words, ROWS, COLUMNS, PER_WORD, EVEN_N, EVEN_K
            )
            n0, k0 = weight_tile(0, c0, tl.minimum(step + 1 + AHEAD, steps - 1), BR, BACKWARD)
            next_loaded = LOAD(side, n0, k0, N, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)
            if AHEAD == 0:
                scales = SCALE(next_loaded, side, state, SIDE)
            elif AHEAD == 1:
                scales = SCALE(loaded, side, state, SIDE)
            else:
                next_scales = SCALE(loaded, side, state, SIDE)
        acc = add_product(acc, xs, tile, BACKWARD, WEIGHT_LEFT)
        if DECODE is not None:
            if PREFETCH:
                tile = DECODE(words, scales, state, PROGRAM, DTYPE, ROWS, COLUMNS)
                words = next_words
            else:
                tile = DECODE(next_words, scales, state, PROGRAM, DTYPE, ROWS, COLUMNS)
            if AHEAD > 0:
                loaded = next_loaded
            if AHEAD == 2:
                scales = next_scales

    if bias is not None:
        terms = tl.load(bias + c0 + edge(c0, columns, BC, EVEN_C)).to(tl.float32)
        if SPLITS > 1:
            terms = tl.where(split == 0, terms, 0.0)
        acc += terms[:, None] if WEIGHT_LEFT else terms[None, :]
    target, stored = output_tile(
        out + tl.cast(split, tl.int64) * out_stride_split,
        out_stride, m0, c0, M, columns, BM, BC, EVEN_C,
    )
    if ACCUMULATE:
        before = tl.load(target, mask=stored, other=0.0).to(tl.float32)
        acc += before.T if WEIGHT_LEFT else before
    result = acc.to(out.dtype.element_ty)
    result = result.T if WEIGHT_LEFT else result
    tl.store(target, result, mask=stored)
