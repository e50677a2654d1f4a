"""Products of experts, whose rows lie one expert after another: with the weights, dense or decoded
in the loop, and of rows with rows. Programs find their expert on the device."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportIndexIssue=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.adapter_start import adapter_start
from qlora_compile.kernels.gpu.gemm import add_product, load_x, output_tile, weight_tile
from qlora_compile.kernels.gpu.weight import edge, load_words


@triton.jit
def rows_of_tile(offsets, tile, experts, S, BM: tl.constexpr, BE: tl.constexpr):
    """Return (expert, first row, end of the expert's rows) of a tile from 0 … S // BM + experts.

    A tile without work has a first row that is not below the end. Rows past all experts' belong to
    the expert number `experts`. Expert e, whose rows begin at s, has the tiles from s // BM + e on:
    no fewer than it needs, and computed without the tiles of other experts. BE: a power of two
    above `experts`.
    """
    es = tl.arange(0, BE)
    starts = tl.load(offsets + es - 1, mask=(es > 0) & (es <= experts), other=0)
    before = (es <= experts) & (starts // BM + es <= tile)
    expert = tl.sum(before.to(tl.int32), axis=0) - 1
    start = tl.where(expert > 0, tl.load(offsets + tl.maximum(expert - 1, 0)), 0)
    end = tl.where(expert < experts, tl.load(offsets + tl.minimum(expert, experts - 1)), S)
    return expert, start + (tile - start // BM - expert) * BM, end


# fmt: off
@triton.jit
def grouped_gemm_kernel(
    x, x_stride, offsets, experts,
    weight, weight_stride_e, weight_stride_n, weight_stride_k,
    side, row_words,
    bias, low, up, scaling,
    out, out_stride,
    S, N, K, width, tiles,
    PREPARE: tl.constexpr, LOAD: tl.constexpr, SCALE: tl.constexpr, DECODE: tl.constexpr,
    PROGRAM: tl.constexpr, PER_WORD: tl.constexpr, SIDE: tl.constexpr,
    DTYPE: tl.constexpr, BACKWARD: tl.constexpr,
    BE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BWIDTH: tl.constexpr, CHUNKS: tl.constexpr, GROUP_M: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr, DESCRIPTOR: tl.constexpr, PREFETCH: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):
    # fmt: on
    """Write, for the rows of each expert e, forward, out [S, N] = x [S, K] W[e]ᵀ + bias[e] +
    low up[e]ᵀ; backward, out [S, K] = x [S, N] W[e] + low up[e]ᵀ; times the number at `scaling` if
    not None. Rows past the last offset become zero.

    offsets: int32 [experts], the end of each expert's rows. weight: int32 words of packed codes of
    W [experts * N, K], or W [experts, N, K] if DECODE is None. side, PREPARE … SIDE: as
    `packed_operand` returns them. low, up: [S, width] and [experts, C, width] of DTYPE, with C the
    output's columns and width a multiple of BWIDTH. tiles: the number of tiles of rows, as
    `rows_of_tile` counts them.

    x: a tensor with row stride, or with DESCRIPTOR a tensor descriptor of tiles [BM, BR].

    The decoded tile is carried: tile k + 1 is decoded after the product with tile k was issued;
    with PREFETCH its words and side were loaded one iteration earlier still.
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
    # Programs of a group share their columns of W and their rows of x in the second-level cache.
    across = tl.cdiv(columns, BC)
    group = pid // (GROUP_M * across)
    height = tl.minimum(tiles - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * across)
    c0 = (within // height) * BC
    row_tile = group * GROUP_M + within % height
    expert, m0, end = rows_of_tile(offsets, row_tile, experts, S, BM, BE)
    if m0 >= end:
        return

    target, stored = output_tile(out, out_stride, m0, c0, end, columns, BM, BC, EVEN_C)
    if expert == experts:
        tl.store(target, tl.zeros((BM, BC), out.dtype.element_ty), mask=stored)
        return

    acc = tl.zeros((BC, BM), tl.float32) if WEIGHT_LEFT else tl.zeros((BM, BC), tl.float32)
    if low is not None:
        # Before the loop: after it, the adapter's product would serialise the loop's last ones.
        up += tl.cast(expert, tl.int64) * columns * width
        acc = adapter_start(
            low, None, up, None, None, m0, c0, end, columns, width,
            BM, BC, BWIDTH, CHUNKS, WEIGHT_LEFT, EVEN_C,
        )  # fmt: skip
    steps = tl.cdiv(reduction, BR)
    x_tile = x
    if not DESCRIPTOR:
        x_tile = x + tl.cast(m0, tl.int64) * x_stride
        x_tile += edge(m0, end, BM, False)[:, None] * x_stride + tl.arange(0, BR)[None, :]
    n_first = expert * N
    n_end = n_first + N
    if DECODE is None:
        weight += tl.cast(expert, tl.int64) * weight_stride_e
    else:
        state = PREPARE(side, SIDE, PROGRAM)
        n0, k0 = weight_tile(n_first, c0, 0, BR, BACKWARD)
        words = load_words(
            weight, n0, k0, n_end, row_words, ROWS, COLUMNS, PER_WORD, EVEN_N, EVEN_K
        )
        loaded = LOAD(side, n0, k0, n_end, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)
        scales = SCALE(loaded, side, state, SIDE)
        tile = DECODE(words, scales, state, PROGRAM, DTYPE, ROWS, COLUMNS)
        if PREFETCH:
            n0, k0 = weight_tile(n_first, c0, tl.minimum(1, steps - 1), BR, BACKWARD)
            words = load_words(
                weight, n0, k0, n_end, row_words, ROWS, COLUMNS, PER_WORD, EVEN_N, EVEN_K
            )
            loaded = LOAD(side, n0, k0, n_end, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)

    for step in tl.range(0, steps, num_stages=STAGES):
        xs = load_x(x, x_tile, m0, step, reduction, BR, DESCRIPTOR, EVEN_R).to(DTYPE)
        if DECODE is None:
            n0, k0 = weight_tile(0, c0, step, BR, BACKWARD)
            ns = (n0 + edge(n0, N, ROWS, EVEN_N)).to(tl.int64)
            ks = (k0 + edge(k0, K, COLUMNS, EVEN_K)).to(tl.int64)
            tile = tl.load(weight + (ns[:, None] * weight_stride_n + ks[None, :] * weight_stride_k))
            tile = tile.to(DTYPE)
        else:
            following = tl.minimum(step + 1 + PREFETCH, steps - 1)
            n0, k0 = weight_tile(n_first, c0, following, BR, BACKWARD)
            next_words = load_words(
                weight, n0, k0, n_end, row_words, ROWS, COLUMNS, PER_WORD, EVEN_N, EVEN_K
            )
            next_loaded = LOAD(side, n0, k0, n_end, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)
            if PREFETCH:
                scales = SCALE(loaded, side, state, SIDE)
            else:
                scales = SCALE(next_loaded, side, state, SIDE)
        acc = add_product(acc, xs, tile, BACKWARD, WEIGHT_LEFT)
        if DECODE is not None:
            if PREFETCH:
                tile = DECODE(words, scales, state, PROGRAM, DTYPE, ROWS, COLUMNS)
                words = next_words
                loaded = next_loaded
            else:
                tile = DECODE(next_words, scales, state, PROGRAM, DTYPE, ROWS, COLUMNS)

    if bias is not None:
        terms = bias + tl.cast(expert, tl.int64) * N + c0 + edge(c0, columns, BC, EVEN_C)
        terms = tl.load(terms).to(tl.float32)
        acc += terms[:, None] if WEIGHT_LEFT else terms[None, :]
    if scaling is not None:
        acc *= tl.load(scaling)
    result = acc.to(out.dtype.element_ty)
    result = result.T if WEIGHT_LEFT else result
    tl.store(target, result, mask=stored)


# fmt: off
@triton.jit
def grouped_gradient_kernel(
    z, z_stride, low, low_stride, offsets,
    out, out_stride_e, out_stride_c, out_stride_r, C, rank,
    BM: tl.constexpr, BC: tl.constexpr, BRANK: tl.constexpr, EVEN_C: tl.constexpr,
):
    # fmt: on
    """Write z [S, C]ᵀ @ low [S, rank] over each expert's rows to out [experts, C, rank] of any
    strides, zero for experts without rows. The product runs in low's dtype, sums are float32."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    ranks = tl.program_id(2) * BRANK + tl.arange(0, BRANK)
    start = tl.where(expert > 0, tl.load(offsets + tl.maximum(expert - 1, 0)), 0)
    end = tl.load(offsets + expert)
    acc = tl.zeros((BC, BRANK), tl.float32)
    for step in range(0, tl.cdiv(end - start, BM)):
        rows = start + step * BM + tl.arange(0, BM)
        inside = (rows < end)[:, None]
        loaded = inside
        if not EVEN_C:
            loaded = loaded & (columns < C)[None, :]
        rows = rows.to(tl.int64)[:, None]
        zs = tl.load(z + rows * z_stride + columns[None, :], mask=loaded, other=0.0)
        ls = tl.load(
            low + rows * low_stride + ranks[None, :],
            mask=inside & (ranks < rank)[None, :],
            other=0.0,
        )
        acc = tl.dot(zs.to(ls.dtype).T, ls, acc)
    target = out + tl.cast(expert, tl.int64) * out_stride_e
    target = target + columns.to(tl.int64)[:, None] * out_stride_c
    target = target + ranks.to(tl.int64)[None, :] * out_stride_r
    stored = (columns < C)[:, None] & (ranks < rank)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=stored)
