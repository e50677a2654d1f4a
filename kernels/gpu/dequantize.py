"""The frozen weight, decoded to memory once: alone, or followed by the scaled adapter."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.weight import edge, load_absmax, load_words, scales_of


@triton.jit
def dequantize_kernel(
    codes,
    absmax,
    nested_codebook,
    nested_absmax,
    nested_offset,
    tables,
    row_words,
    row_blocks,
    up,
    scaling,
    out,
    out_stride,
    N,
    K,
    rank,
    DECODE: tl.constexpr,
    PREPARE: tl.constexpr,
    PROGRAM: tl.constexpr,
    PER_WORD: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    DIVISOR: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """out [N, K] = W, of DTYPE, or out [N, K + rank] = [W | s * up] with up [N, rank] and
    the number s at `scaling`.

    Grid: tiles of rows, and of columns with as many more as cover the adapter.
    """
    n0 = tl.program_id(0) * ROWS
    column = tl.program_id(1)
    tiles = tl.cdiv(K, COLUMNS)
    rows = tl.arange(0, ROWS)
    inside = n0 + rows < N
    target = out + tl.cast(n0, tl.int64) * out_stride + rows[:, None] * out_stride
    if column < tiles:
        k0 = column * COLUMNS
        offset = 0.0
        if nested_offset is not None:
            offset = tl.load(nested_offset)
        words = load_words(codes, n0, k0, N, row_words, ROWS, COLUMNS, PER_WORD, EVEN_N, EVEN_K)
        values, nested = load_absmax(
            absmax,
            nested_absmax,
            n0,
            k0,
            N,
            K,
            row_blocks,
            ROWS,
            COLUMNS,
            BLOCK_SHIFT,
            GROUP,
            EVEN_N,
            EVEN_K,
        )
        scales = scales_of(values, nested, nested_codebook, offset, DIVISOR)
        tile = DECODE(words, scales, PREPARE(tables, PROGRAM), PROGRAM, DTYPE, ROWS, COLUMNS)
        columns = k0 + tl.arange(0, COLUMNS)
        stored = inside[:, None]
        if not EVEN_K:
            stored = stored & (columns < K)[None, :]
        tl.store(target + columns[None, :], tile, mask=stored)
    else:
        if up is not None:
            ranks = (column - tiles) * COLUMNS + tl.arange(0, COLUMNS)
            scaled_inside = inside[:, None] & (ranks < rank)[None, :]
            base = up + tl.cast(n0, tl.int64) * rank
            at = edge(n0, N, ROWS, EVEN_N)[:, None] * rank + ranks[None, :]
            scaled = tl.load(base + at, mask=scaled_inside, other=0.0).to(tl.float32)
            scaled *= tl.load(scaling)
            tl.store(target + (K + ranks)[None, :], scaled.to(DTYPE), mask=scaled_inside)
