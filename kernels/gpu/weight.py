"""Tiles of the frozen weight: words of packed codes, and the dense tile.

A tile holds rows n0 … n0 + ROWS and columns k0 … k0 + COLUMNS of W [N, K]. Positions past the edge
repeat the last valid one: whatever they decode to is finite, and meets zeros or is not stored.
"""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def edge(start, limit, SIZE: tl.constexpr, EVEN: tl.constexpr):
    """Return 0 … SIZE, kept below limit - start unless EVEN."""
    offsets = tl.arange(0, SIZE)
    if not EVEN:
        offsets = tl.minimum(offsets, limit - 1 - start)
    return offsets


# fmt: off
@triton.jit
def load_words(
    codes, n0, k0, N, row_words,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_WORD: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):
    # fmt: on
    """Return int32 words [ROWS, COLUMNS / PER_WORD] of packed codes."""
    w0 = k0 // PER_WORD
    rows = edge(n0, N, ROWS, EVEN_N)
    columns = edge(w0, row_words, COLUMNS // PER_WORD, EVEN_K)
    if COLUMNS // PER_WORD <= 4:
        # A thread with a row of its own would store the decoded row in pieces of two bytes.
        columns = tl.max_contiguous(columns, 2)
    base = codes + (tl.cast(n0, tl.int64) * row_words + w0)
    return tl.load(base + (rows[:, None] * row_words + columns[None, :]))


# fmt: off
@triton.jit
def load_dense(
    weight, weight_stride, n0, k0, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):
    # fmt: on
    """Return a tile [ROWS, COLUMNS] of a weight kept in its own dtype."""
    rows = edge(n0, N, ROWS, EVEN_N)
    columns = edge(k0, K, COLUMNS, EVEN_K)
    base = weight + (tl.cast(n0, tl.int64) * weight_stride + k0)
    return tl.load(base + (rows[:, None] * weight_stride + columns[None, :]))
