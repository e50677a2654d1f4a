"""An adapter's thin products: bfloat16 rows with a float32 factor, without a float32 copy of the
rows, on CPUs with AMX. Without it torch's float32 products are the faster ones."""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED, compiled, has_compiler

_ARGUMENTS = (
    *("int64_t", "uint16_t*", "int64_t", "int64_t", "int64_t"),
    *("const float*", "int64_t", "int64_t", "int64_t"),
    *("float*", "int64_t", "int64_t", "float", "int64_t"),
)


def available(rows: Tensor, factor: torch.dtype) -> bool:
    """Whether products of `rows` and a factor of that dtype can be computed so."""
    return (
        rows.numel() > 0
        and rows.device.type == "cpu"
        and rows.dtype == torch.bfloat16
        and factor == torch.float32
        and has_amx()
    )


@functools.cache
def has_amx() -> bool:
    """Whether there is AMX, and a compiler that knows it: without them there is nothing to call."""
    if platform.system() != "Linux" or not torch.cpu._is_amx_tile_supported():
        return False
    if not has_compiler() or not torch.cpu._init_amx():
        return False
    from torch._inductor.exc import CppCompileError

    try:
        _kernel()
    except CppCompileError as error:
        message = (
            f"this CPU's AMX is not used for adapters, the compiler does not build it: {error}"
        )
        warnings.warn(message, stacklevel=2)
        return False
    return True


def product(x: Tensor, factor: Tensor, out: Tensor, scaling: float) -> None:
    """out = scaling * x @ factorᵀ: bfloat16 x [M, K] of contiguous rows, float32 factor [R, K],
    float32 out [M, R] of contiguous rows."""
    _run(0, x, factor, factor.shape[0], factor.stride(), out, scaling)


def gradient(low: Tensor, x: Tensor, out: Tensor) -> None:
    """out = lowᵀ @ x: float32 low [M, R] and bfloat16 x [M, K] of contiguous rows, float32 out
    [R, K]."""
    _run(1, x, low, low.shape[1], low.stride(), out)


def add_product(total: Tensor, low: Tensor, factor: Tensor) -> None:
    """total += low @ factor but for 2^-17 of the product: bfloat16 total [M, N] and float32 low
    [M, R] of contiguous rows, float32 factor [R, N]."""
    _run(2, total, factor, factor.shape[0], factor.stride(), low)


def _run(
    operation: int,
    rows: Tensor,
    factor: Tensor,
    rank: int,
    steps: tuple[int, ...],
    out: Tensor,
    scaling: float = 1.0,
) -> None:
    """As thin.cpp tells of each `operation`."""
    threads = torch.get_num_threads()
    shape = (rows.stride(0), *rows.shape)
    _kernel()(operation, rows, *shape, factor, rank, *steps, out, *out.stride(), scaling, threads)


@functools.cache
def _kernel() -> Callable[..., Any]:
    source = (Path(__file__).parent / "thin.cpp").read_text()
    return compiled(VECTORISED + BFLOAT16 + source, _ARGUMENTS)
