"""The dropout mask of `kernels/dropout.py` on the device, bit for bit, eight elements per byte.

A mask lives as long as one direction of one op. A kernel reads one bit per element for its tiles;
drawing the counters in place took registers that the accumulator needs.
"""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def _bit(word, SHIFT: tl.constexpr, threshold, LANE: tl.constexpr):
    return (((word >> SHIFT) & 0xFFFF) >= threshold).to(tl.int32) << LANE


@triton.jit(do_not_specialize=["subsequence", "threshold"])
def keep_bits_kernel(
    seed, subsequence, threshold, bits, count, SIZE: tl.constexpr, ROUNDS: tl.constexpr
):
    """Write bits, uint8 [count]: bit j of byte i is 1 if element 8 i + j of the input is kept.

    seed: int64 [1]. Philox4x32 with counter (i, subsequence) and the seed as key; a lane below
    `threshold` drops its element.
    """
    index = tl.cast(tl.program_id(0), tl.int64) * SIZE + tl.arange(0, SIZE)
    key = tl.load(seed)
    key0 = key.to(tl.uint32)
    key1 = (key >> 32).to(tl.uint32)
    c0 = index.to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = tl.full(c0.shape, subsequence, tl.uint32)
    c3 = tl.zeros_like(c0)
    first = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    second = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0 = tl.umulhi(c0, first)
        high1 = tl.umulhi(c2, second)
        low0 = c0 * first
        low1 = c2 * second
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    byte = _bit(c0, 0, threshold, 0) | _bit(c0, 16, threshold, 1)
    byte |= _bit(c1, 0, threshold, 2) | _bit(c1, 16, threshold, 3)
    byte |= _bit(c2, 0, threshold, 4) | _bit(c2, 16, threshold, 5)
    byte |= _bit(c3, 0, threshold, 6) | _bit(c3, 16, threshold, 7)
    tl.store(bits + index, byte.to(tl.uint8), mask=index < count)


@triton.jit
def is_kept(bits, m0, rows, columns, K, inside):
    """Return which elements (m0 + rows, columns) of a [M, K] input are kept; K is a multiple of 8.

    rows, columns: int32, broadcastable. inside: which elements exist; the others are dropped.
    """
    base = bits + tl.cast(m0, tl.int64) * (K // 8)
    byte = tl.load(base + (rows * (K // 8) + (columns >> 3)), mask=inside, other=0)
    return ((byte.to(tl.int32) >> (columns & 7)) & 1) != 0
