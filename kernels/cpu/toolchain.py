"""Compiling C++ functions for the processor at hand, by Inductor's toolchain and into its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from qlora_compile.kernels.cpu import instructions
from qlora_compile.kernels.cpu.native_function import NativeFunction
from qlora_compile.kernels.cpu.once import once
from qlora_compile.kernels.cpu.torn_files import remove_torn_files

VECTORISED = r"""
#if defined(__GNUC__) && !defined(__clang__)
// Inductor's flags leave it off, for its code has vectors of its own.
#pragma GCC optimize("tree-loop-vectorize")
#if defined(__AVX512F__)
#pragma GCC target("prefer-vector-width=512")
#endif
#endif
"""
"""C++ for the beginning of a source: has the compiler vectorise loops marked by `omp simd`."""

BFLOAT16 = r"""
#include <cstdint>
#include <cstring>

static inline float load(const uint16_t* in) {
  const uint32_t bits = static_cast<uint32_t>(*in) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
static inline float load(const float* in) { return *in; }

// To nearest even. Arithmetic's own NaNs stay NaN; one whose mantissa is all ones may not.
static inline void store(uint16_t* out, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  *out = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
static inline void store(float* out, float value) { *out = value; }
"""
"""C++: reading and writing one number, bfloat16 or float32."""

_LIMITS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "avx2": (("-mno-avx512f",), {"cpp.simdlen": 256}),
    "avx512": (("-mno-avx512bf16",), {}),
}
"""The compiler's flags, and Inductor's settings, that keep C++ from instructions above a level; by
Inductor's own flags C++ gets all that the processor has."""


def compiled(source: str, arguments: tuple[str, ...]) -> NativeFunction:
    """Compile a C++ source for the present `instructions.level` and return its function `kernel`.
    arguments: the C++ types of its parameters."""
    return _compiled(source, arguments, instructions.level())


@once
def _compiled(source: str, arguments: tuple[str, ...], level: str | None) -> NativeFunction:
    from torch._inductor import config

    choose_instructions()
    # Other flags would have Inductor prepare its headers once more, in every process.
    limits = _LIMITS.get(level or "") if instructions.is_capped() else None
    flags, settings = limits or ((), {})
    with config.patch(settings):
        return NativeFunction(_built(source, arguments, flags), arguments)


@once
def choose_instructions() -> None:
    """Have Inductor take the largest set of vector instructions that the processor names, if the
    compiler builds one function with this set. Inductor itself builds two functions for every set,
    one after another, which on a new machine takes a quarter of the time of compiling four blocks.
    Before that, remove torn files from Inductor's cache.
    """
    from torch._inductor import config, cpu_vec_isa, exc

    remove_torn_files()
    if config.cpp.vec_isa_ok is not None or not has_compiler():
        return
    with config.patch({"cpp.vec_isa_ok": True}):
        cpu_vec_isa.valid_vec_isa_list()
    try:
        _built('extern "C" void kernel(int64_t) {}', ("int64_t",))
    except exc.CppCompileError:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()


def _built(
    source: str, arguments: tuple[str, ...], flags: tuple[str, ...] = ()
) -> Callable[..., Any]:
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    return CppPythonBindingsCodeCache.load_pybinding(
        list(arguments), for_this_machine(source), extra_flags=flags
    )


def for_this_machine(source: str) -> str:
    """Return a C++ source that Inductor's cache does not take for that of another torch, which may
    have been installed in place of this one, or of another processor, which may share the folder:
    Inductor's key has the compiler's `-march=native` as it stands."""
    made_for = f"torch {torch.__version__}, {torch.version.git_version}, {instructions.processor()}"
    return f"// {made_for}\n{source}"


@functools.cache
def has_compiler() -> bool:
    # Inductor imports Triton, which decides at that moment whether it interprets kernels.
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True
