"""Tests of the interpreter run where Triton interprets, which is where torch sees no device."""

from collections.abc import Iterator

import pytest
from triton import knobs

from tests.interpreter.honest import honest_interpreter
from tests.interpreter.memory import MemoryGuard


@pytest.fixture(autouse=True)
def interpreting() -> None:
    if not knobs.runtime.interpret:
        pytest.skip("Triton compiles kernels here: TRITON_INTERPRET=1 was not set when it loaded")


@pytest.fixture
def guard(interpreting: None) -> Iterator[MemoryGuard]:
    """The test runs inside `honest_interpreter`."""
    with honest_interpreter() as guard:
        yield guard
