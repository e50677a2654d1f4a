"""The interpreter that computes as a GPU does, for the modules that launch kernels; each level of a
CPU's instructions, for those that call C++."""

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
    """Have C++ kernels use one level of instructions and those below it, each that the processor
    has in turn."""
    here = instructions.levels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instructions, "level", lambda: request.param)
        patch.setattr(instructions, "levels", lambda: here[here.index(request.param) :])
        yield request.param
