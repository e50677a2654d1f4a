"""Kernels in C++ for several sets of instructions: the best that the compiler builds is taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_compile.kernels.cpu import instructions
from qlora_compile.kernels.cpu.once import once
from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED, compiled, has_compiler


@dataclass(frozen=True, eq=False)
class NativeKernel:
    """A C++ function `kernel`.

    sources: levels of instructions, the best first, each with the names of the files that make up
    its source. arguments: as `compiled` takes them. prefix: C++ that comes before the files.
    """

    sources: tuple[tuple[str, tuple[str, ...]], ...]
    arguments: tuple[str, ...]
    prefix: str = ""

    def expected(self) -> bool:
        """Whether there is a `function`, provided that the compiler builds one of the sources."""
        known = {name for name, _ in self.sources}
        return has_compiler() and not known.isdisjoint(instructions.levels())

    def function(self) -> Callable[..., Any] | None:
        """Return the function for the best level that the processor has and the compiler builds;
        None without any."""
        return _function(self, instructions.levels())


@once
def _function(kernel: NativeKernel, levels: tuple[str, ...]) -> Callable[..., Any] | None:
    if not has_compiler():
        return None
    from torch._inductor.exc import CppCompileError

    folder = Path(__file__).parent
    for level, files in kernel.sources:
        if level not in levels:
            continue
        texts = [kernel.prefix, *((folder / f"{each}.cpp").read_text() for each in files)]
        try:
            return compiled("".join([VECTORISED, BFLOAT16, *texts]), kernel.arguments)
        except CppCompileError as error:
            message = (
                f"this CPU's {level} is not used for {files[-1]}.cpp, which the compiler does not "
                f"build: {error}"
            )
            warnings.warn(message, stacklevel=2)
    return None
