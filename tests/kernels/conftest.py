"""The interpreter that computes as a GPU does, for the modules that launch kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from triton import knobs

from tests.interpreter.honest import honest_interpreter


@pytest.fixture(scope="module")
def interpreting() -> Iterator[None]:
    if not knobs.runtime.interpret:
        pytest.skip("Triton compiles kernels here; tests/gpu runs them on the device")
    with honest_interpreter():
        yield
