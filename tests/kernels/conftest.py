"""Fixtures: the interpreter that computes like a GPU, for modules that launch kernels, and each
level of a CPU's instructions, for modules that call C++."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from triton import knobs

from qlora_compile.kernels.cpu import instructions
from tests.interpreter.honest import honest_interpreter


@pytest.fixture(scope="module")
def interpreting() -> Iterator[None]:
    if not knobs.runtime.interpret:
        pytest.skip("Triton compiles kernels here; tests/gpu runs them on the device")
    with honest_interpreter():
        yield


@pytest.fixture(scope="module", params=instructions.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Have C++ kernels use one of the processor's levels of instructions, and those below it."""
    here = instructions.levels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instructions, "level", lambda: request.param)
        patch.setattr(instructions, "levels", lambda: here[here.index(request.param) :])
        yield request.param
