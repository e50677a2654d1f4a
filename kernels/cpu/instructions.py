"""The vector instructions that our C++ uses: the best of the processor, or a lower level."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from qlora_compile.kernels.cpu.errors import UnknownCpuLevelError

LEVELS = ("avx2", "avx512", "avx512_bf16", "amx")
"""Sets of instructions, each with those before it."""

_DOWN_FROM = {name: LEVELS[index::-1] for index, name in enumerate(LEVELS)}

VARIABLE = "QLORA_COMPILE_CPU"
"""The environment variable that names the highest level to use."""


CPUINFO = Path("/proc/cpuinfo")
"""What Linux says of each of its processors, one after another."""

_KIND = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ", "isa")
"""How the lines begin that tell one kind of processor from another."""


@functools.cache
def processor() -> str:
    """Return a digest of the processor's name and instructions."""
    said = [platform.machine()]
    try:
        with CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            first = itertools.takewhile(str.strip, lines)
            said += [line for line in first if line.startswith(_KIND)]
    except OSError:  # no Linux
        said.append(platform.processor())
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


@functools.cache
def level() -> str | None:
    """Return the best of `LEVELS` that the processor has, at most the one that the environment
    variable QLORA_COMPILE_CPU names. Return None for a processor without AVX2.

    Raises:
        UnknownCpuLevelError: the variable names no level.
    """
    most = os.environ.get(VARIABLE, LEVELS[-1])
    if most not in LEVELS:
        raise UnknownCpuLevelError(variable=VARIABLE, value=most, levels=", ".join(LEVELS))
    return _best(LEVELS[: LEVELS.index(most) + 1])


def is_capped() -> bool:
    """Whether the processor has a better level than `level`."""
    return level() != _best(LEVELS)


def _best(names: Sequence[str]) -> str | None:
    return next(filter(_has, reversed(names)), None)


def levels() -> tuple[str, ...]:
    """Return `level` and those below it, the best first."""
    best = level()
    return () if best is None else _DOWN_FROM[best]


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of a float `dtype` by instructions that the CPU has for it,
    and that `level` allows.

    Without them torch's 16-bit products are plain loops: on AVX2 they take 6 times as long as
    float32 ones where the right matrix is transposed, and 40 to 400 times where not.
    """
    if dtype == torch.bfloat16:
        return level() != "avx2" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return level() != "avx2" and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a CPU multiplies operands of `dtype` fastest without losing
    accuracy: `dtype` itself, or float32."""
    return dtype if multiplies(dtype) else torch.float32


def _has(name: str) -> bool:
    if name == "amx":
        linux = platform.system() == "Linux"
        return linux and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    supported = {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
        "avx512": torch.cpu._is_avx512_supported,
        "avx2": torch.cpu._is_avx2_supported,
    }
    return supported[name]()
