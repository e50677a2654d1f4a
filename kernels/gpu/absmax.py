"""Doubly quantised absmax, decoded once for a kernel that reads each value many times."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def absmax_kernel(
    codes, nested_codebook, nested_absmax, nested_offset, out, blocks, SIZE: tl.constexpr
):
    """out [blocks], float32: nested_codebook[codes] * nested_absmax[b // 256] + nested_offset."""
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = index < blocks
    values = tl.load(nested_codebook + tl.load(codes + index, mask=inside, other=0).to(tl.int32))
    nested = tl.load(nested_absmax + (index >> 8), mask=inside, other=0.0)
    tl.store(out + index, values * nested + tl.load(nested_offset), mask=inside)
