"""Decodes the frozen weight to memory, alone or followed by the scaled adapter."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.gpu.weight import edge, load_words


# fmt: off
@triton.jit
def dequantize_kernel(
    codes, side, row_words, up, scaling, out, out_stride,
    N, K, rank,
    PREPARE: tl.constexpr, LOAD: tl.constexpr, SCALE: tl.constexpr, DECODE: tl.constexpr,
    PROGRAM: tl.constexpr, PER_WORD: tl.constexpr, SIDE: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):
    # fmt: on
    """Write W to out [N, K] of DTYPE, or [W | s * up] to out [N, K + rank], with up [N, rank] and
    the number s at `scaling`.

    side, PREPARE … SIDE: as `packed_operand` gives them.

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
        state = PREPARE(side, SIDE, PROGRAM)
        words = load_words(codes, n0, k0, N, row_words, ROWS, COLUMNS, PER_WORD, EVEN_N, EVEN_K)
        loaded = LOAD(side, n0, k0, N, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)
        scales = SCALE(loaded, side, state, SIDE)
        tile = DECODE(words, scales, state, PROGRAM, DTYPE, ROWS, COLUMNS)
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
