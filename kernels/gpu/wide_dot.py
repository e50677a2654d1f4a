"""Products on tensor cores with float32 operands that keep more bits than tensor cores do."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def _bf16_term(value):
    """Return the leading 8 bits of float32 `value`, and the rest."""
    term = value.to(tl.bfloat16)
    return term, value - term.to(tl.float32)


@triton.jit
def dot_float32_right(left, right, acc):
    """Return acc + left @ right, with left [M, K] of bf16 or fp16, and all 24 bits of float32 right
    [K, N].

    A float32 is the sum of three bf16, a float16 of two, and products of two bf16 are exact in the
    float32 accumulator.
    """
    r0, rest = _bf16_term(right)
    r1, rest = _bf16_term(rest)
    r2, _ = _bf16_term(rest)
    if left.dtype == tl.bfloat16:
        acc = tl.dot(left, r2, acc)
        acc = tl.dot(left, r1, acc)
        acc = tl.dot(left, r0, acc)
    else:
        l0, rest = _bf16_term(left.to(tl.float32))
        l1, _ = _bf16_term(rest)
        acc = tl.dot(l0, r2, acc)
        acc = tl.dot(l1, r1, acc)
        acc = tl.dot(l0, r1, acc)
        acc = tl.dot(l1, r0, acc)
        acc = tl.dot(l0, r0, acc)
    return acc
