"""`honest_interpreter`: Triton's interpreter, corrected where it computes what no GPU would."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tests.interpreter.bfloat16 import bfloat16_arithmetic
from tests.interpreter.inline_asm import inline_assembly
from tests.interpreter.launch import honest_launches
from tests.interpreter.memory import MemoryGuard, memory_guard
from tests.interpreter.overhead import less_overhead
from tests.interpreter.reductions import sixteen_bit_reductions

KNOWN_VERSION = "3.9.0"

_active: MemoryGuard | None = None


def check_version(version: str) -> None:
    """Raise RuntimeError unless `version` is the Triton whose interpreter these modules mend."""
    if version != KNOWN_VERSION:
        raise RuntimeError(
            f"tests.interpreter mends the interpreter of Triton {KNOWN_VERSION}, and this is "
            f"Triton {version}: compare triton/runtime/interpreter.py of both, adapt, and raise "
            "KNOWN_VERSION"
        )


@contextlib.contextmanager
def honest_interpreter() -> Iterator[MemoryGuard]:
    """Kernels that run inside compute as on an NVIDIA GPU, or raise where they would misbehave.

    Right: bfloat16, 16-bit sums, tf32 dot products, PTX inline assembly, float arguments, loop
    variables. Raised: `InvalidAccess` for accesses outside of the tensors of a launch (`allow` of
    the guard given here adds tensors that kernels reach by other ways) and misaligned ones,
    `IntegerOverflow`, `PtxError`. NaN: elements that a load without `other` masks off.

    On leaving, everything is as it was. Nesting is allowed and changes nothing.
    Raises RuntimeError on an unknown Triton, or if Triton was imported without TRITON_INTERPRET=1.
    """
    global _active
    check_version(triton.__version__)
    if not isinstance(tl.sum, InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 in the environment before triton is imported")
    if _active is not None:
        yield _active
        return
    with contextlib.ExitStack() as stack:
        for mend in (less_overhead, bfloat16_arithmetic, sixteen_bit_reductions, inline_assembly):
            stack.enter_context(mend())
        # Last, so that the atomics it guards are the mended ones.
        guard = stack.enter_context(memory_guard())
        stack.enter_context(honest_launches(guard))
        _active = guard
        try:
            yield guard
        finally:
            _active = None
