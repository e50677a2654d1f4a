"""An adapter's thin products: bfloat16 rows with a float32 factor, without a float32 copy of the
rows, on CPUs with AMX. Without it torch's float32 products are the faster ones."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED, compiled, has_compiler

_ARGUMENTS = (
    *("int64_t", "const uint16_t*", "int64_t", "int64_t", "int64_t"),
    *("const float*", "int64_t", "int64_t", "int64_t"),
    *("float*", "int64_t", "int64_t"),
    *("uint16_t*", "int64_t", "int64_t", "float", "int64_t"),
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
    """Whether there is AMX, and a compiler: without them there is nothing here to call."""
    if platform.system() != "Linux" or not torch.cpu._is_amx_tile_supported():
        return False
    return has_compiler() and torch.cpu._init_amx()


def product(x: Tensor, factor: Tensor, out: Tensor, scaling: float) -> None:
    """out = scaling * x @ factorᵀ: bfloat16 x [M, K] of contiguous rows, float32 factor [R, K],
    float32 out [M, R] of contiguous rows."""
    steps = (*factor.stride(), out, out.stride(0), 1, x, 0, 0)
    _run(0, x, x.stride(0), *x.shape, factor, factor.shape[0], *steps, scaling)


def gradient(low: Tensor, x: Tensor, out: Tensor) -> None:
    """out = lowᵀ @ x: float32 low [M, R] and bfloat16 x [M, K] of contiguous rows, float32 out
    [R, K]."""
    steps = (low.stride(0), 1, out, *out.stride(), x, 0, 0)
    _run(1, x, x.stride(0), *x.shape, low, low.shape[1], *steps, 1.0)


def three_parts(factor: Tensor, out: Tensor, *, left: bool) -> None:
    """Writes a float32 factor [M, N] as three in bfloat16, `out` [3, M, N]: a `left` one times a
    right one, summed over the three, is the float32 factors' product but for 2^-16 of its terms.
    Rows of both are contiguous."""
    steps = (factor.stride(0), 1, factor, 0, 0, out, out.stride(1), out.stride(0))
    _run(2 if left else 3, out, 0, 0, factor.shape[1], factor, factor.shape[0], *steps, 1.0)


def _run(*arguments: object) -> None:
    _kernel()(*arguments, torch.get_num_threads())


@functools.cache
def _kernel():
    source = (Path(__file__).parent / "thin.cpp").read_text()
    return compiled(VECTORISED + BFLOAT16 + source, _ARGUMENTS)
