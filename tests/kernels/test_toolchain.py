"""Which instructions C++ is compiled for: those of the processor, if the compiler knows them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from torch._inductor import config, cpu_vec_isa, exc

from qlora_compile.kernels.cpu import toolchain

pytestmark = pytest.mark.skipif(not toolchain.has_compiler(), reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    yield
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    toolchain.choose_instructions()


def choose() -> int:
    """Return how many sets of instructions Inductor believes in afterwards, without asking a
    compiler."""
    inspect.unwrap(toolchain.choose_instructions)()
    return cpu_vec_isa.valid_vec_isa_list.cache_info().currsize


def test_the_processors_are_taken() -> None:
    assert choose() == 1
    chosen = cpu_vec_isa.pick_vec_isa()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    assert chosen == cpu_vec_isa.pick_vec_isa()  # by Inductor, which asks the compiler
    assert config.cpp.vec_isa_ok is None


def test_a_compiler_that_does_not_know_them_is_asked_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(source: str, arguments: tuple[str, ...]) -> Any:
        raise exc.CppCompileError(["g++"], "unrecognized command-line option '-mamx-tile'")

    monkeypatch.setattr(toolchain, "_built", fail)
    assert choose() == 0


@pytest.mark.parametrize("answer", [True, False])
def test_what_the_user_set_stays(answer: bool) -> None:
    with config.patch({"cpp.vec_isa_ok": answer}):
        assert choose() == 0
