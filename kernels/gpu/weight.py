"""Tiles of the frozen weight: packed words, absmax, and the decoded or dense tile.

A tile holds rows n0 … n0 + ROWS and columns k0 … k0 + COLUMNS of W [N, K]. Positions past the edge
repeat the last valid one: whatever they decode to is finite, and meets zeros or is not stored.
"""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def edge(start, limit, SIZE: tl.constexpr, EVEN: tl.constexpr):
    """0 … SIZE, kept below limit - start unless EVEN."""
    offsets = tl.arange(0, SIZE)
    if not EVEN:
        offsets = tl.minimum(offsets, limit - 1 - start)
    return offsets


@triton.jit
def load_words(
    codes,
    n0,
    k0,
    N,
    row_words,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_WORD: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """int32 [ROWS, COLUMNS / PER_WORD]."""
    w0 = k0 // PER_WORD
    rows = edge(n0, N, ROWS, EVEN_N)
    columns = edge(w0, row_words, COLUMNS // PER_WORD, EVEN_K)
    if COLUMNS // PER_WORD <= 4:
        # A thread with a row of its own would store the decoded row in pieces of two bytes.
        columns = tl.max_contiguous(columns, 2)
    base = codes + (tl.cast(n0, tl.int64) * row_words + w0)
    return tl.load(base + (rows[:, None] * row_words + columns[None, :]))


@triton.jit
def load_absmax(
    absmax,
    nested_absmax,
    n0,
    k0,
    N,
    K,
    row_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The absmax of each run of GROUP columns and, doubly quantised, the absmax of its 256.

    [ROWS] where a row of the tile is one run, else [ROWS, COLUMNS / GROUP]. BLOCK_SHIFT: log2 of
    the block size, -1: one block a row. row_blocks: blocks in a row, None where blocks do not begin
    with rows.
    """
    rows = edge(n0, N, ROWS, EVEN_N)
    if COLUMNS == GROUP:
        # One-dimensional until the scales meet the words: a column of its own would get a layout
        # of its own, and the words would be moved to it.
        index = n0 + rows
        columns = k0
    else:
        index = (n0 + rows)[:, None]
        columns = (k0 + tl.arange(0, COLUMNS // GROUP) * GROUP)[None, :]
    if not EVEN_K:
        columns = tl.minimum(columns, K - 1)
    if BLOCK_SHIFT >= 0:
        if row_blocks is None:
            index = ((index.to(tl.int64) * K + columns) >> BLOCK_SHIFT).to(tl.int32)
        else:
            index = index * row_blocks + (columns >> BLOCK_SHIFT)
    values = tl.load(absmax + index)
    nested = values
    if nested_absmax is not None:
        nested = tl.load(nested_absmax + (index >> 8))
    return values, nested


@triton.jit
def scales_of(values, nested, nested_codebook, offset, DIVISOR: tl.constexpr):
    """float32 scales of what `load_absmax` returned: absmax / DIVISOR."""
    scales = values
    if nested_codebook is not None:
        scales = tl.load(nested_codebook + values.to(tl.int32)) * nested + offset
    if DIVISOR != 1:
        scales = tl.div_rn(scales, DIVISOR)
    return scales


@triton.jit
def load_dense(
    weight,
    weight_stride,
    n0,
    k0,
    N,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """[ROWS, COLUMNS] of a weight kept in its own dtype."""
    rows = edge(n0, N, ROWS, EVEN_N)
    columns = edge(k0, K, COLUMNS, EVEN_K)
    base = weight + (tl.cast(n0, tl.int64) * weight_stride + k0)
    return tl.load(base + (rows[:, None] * weight_stride + columns[None, :]))
