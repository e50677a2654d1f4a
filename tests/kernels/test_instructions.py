"""Which instructions C++ uses: the best of the processor's, or fewer where the user says so."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator

import pytest
import torch

from qlora_compile.kernels.cpu import instructions, native
from qlora_compile.kernels.cpu.errors import UnknownCpuLevelError
from qlora_compile.kernels.cpu.native import NativeKernel
from qlora_compile.kernels.cpu.toolchain import has_compiler
from qlora_compile.kernels.variants.native_adapter import native_dtypes


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    instructions.level.cache_clear()
    yield
    instructions.level.cache_clear()


@pytest.mark.parametrize("most", instructions.LEVELS)
@pytest.mark.parametrize("best", [None, *instructions.LEVELS])
def test_a_level_is_the_best_at_most_the_one_asked_for(
    most: str, best: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = instructions.LEVELS
    here = () if best is None else order[: order.index(best) + 1]
    monkeypatch.setattr(instructions, "_has", lambda name: name in here)
    monkeypatch.setenv(instructions.VARIABLE, most)
    expected = None if best is None else min(best, most, key=order.index)
    assert instructions.level() == expected
    assert instructions.is_capped() == (expected != best)


@pytest.mark.parametrize("value", ["", "AVX2", "sse", "avx512 "])
def test_a_name_of_no_level_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(instructions.VARIABLE, value)
    with pytest.raises(UnknownCpuLevelError, match=f"QLORA_COMPILE_CPU is {value!r}.*avx512_bf16"):
        instructions.level()


def test_a_level_without_16_bit_products_multiplies_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(instructions, "level", lambda: "avx2")
    for dtype in (torch.bfloat16, torch.float16):
        assert instructions.product_dtype(dtype) == torch.float32
        assert native_dtypes(dtype) == [torch.float32]
    for dtype in (torch.float32, torch.float64):
        assert native_dtypes(dtype) == [dtype]


@pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
def test_a_compiler_that_does_not_know_a_level_is_told_and_the_next_one_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor.exc import CppCompileError

    def compiled(source: str, arguments: tuple[str, ...]) -> object:
        if "_tile_dpbf16ps" in source:
            raise CppCompileError(["g++"], "unrecognized command-line option '-mamx-tile'")
        return "built"

    monkeypatch.setattr(native, "compiled", compiled)
    sources = (("amx", ("tiles", "tiles_amx")), ("avx2", ("vectors", "thin")))
    kernel = NativeKernel(sources, ())
    with pytest.warns(UserWarning, match="(?s)amx is not used for tiles_amx.cpp.*unrecog") as told:
        assert inspect.unwrap(native._function)(kernel, ("amx", "avx2")) == "built"
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect.unwrap(native._function)(kernel, ("avx2",)) == "built"
        assert inspect.unwrap(native._function)(kernel, ()) is None
