"""Loop variables in Triton's interpreter: int32 or int64 scalars, as compiled, not Python ints.

So `k.to(tl.int64)` works in a loop, and products with the loop variable overflow where they would
on a GPU.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import ASTTransformer, TensorHandle

# The name that `range` gets in a kernel. Triton copies its interpreter module's globals into the
# globals of each kernel, and an attribute of that name travels along.
RANGE_NAME = "_interpreted_range"


def loop_range(start: Any, stop: Any = None, step: Any = None, **options: Any) -> Iterator[Any]:
    """Take the place of `range` and `tl.range` inside a kernel; options only steer the compiler.

    Bounds are ints or scalar integer tensors. The loop variable is int64 if one of them needs it.
    """
    if stop is None:
        start, stop = 0, start
    if step is None:
        step = 1
    bounds = range(int(start), int(stop), int(step))
    wide = any(_needs_int64(bound) for bound in (start, stop, step))
    dtype, numpy_dtype = (tl.int64, np.int64) if wide else (tl.int32, np.int32)
    for value in bounds:
        yield tl.tensor(TensorHandle(np.array([value], numpy_dtype), dtype), dtype)


def _needs_int64(bound: Any) -> bool:
    if isinstance(bound, tl.tensor):
        return bound.dtype.int_bitwidth == 64
    return not -(1 << 31) <= int(bound) < 1 << 31


class LoopTransformer(ASTTransformer):
    """Rewrites kernels as Triton's interpreter does, and `for … in range(…)` too."""

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        call = node.iter
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):  # noqa: SIM102
            if call.func.id == "range":
                call.func.id = RANGE_NAME
        return node
