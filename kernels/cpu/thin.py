"""An adapter's thin products of bfloat16, float16 or float32 rows with a float32 factor, without a
float32 copy of the rows: of bfloat16 rows by AMX's tiles where the CPU has them, else by float32
vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.native import NativeKernel

_ARGUMENTS = (
    *("int64_t", "uint16_t*", "int64_t", "int64_t", "int64_t"),
    *("const float*", "int64_t", "int64_t", "int64_t"),
    *("float*", "int64_t", "int64_t", "float", "int64_t"),
)
_VECTORS = tuple((level, ("vectors", "thin", "thin_kernel")) for level in ("avx512", "avx2"))
_TILES = ("amx", ("tiles", "tiles_amx", "thin_amx", "thin_kernel"))

_KERNELS = {
    torch.bfloat16: NativeKernel((_TILES, *_VECTORS), _ARGUMENTS, "typedef uint16_t Number;\n"),
    torch.float16: NativeKernel(_VECTORS, _ARGUMENTS, "struct Half;\ntypedef Half Number;\n"),
    torch.float32: NativeKernel(_VECTORS, _ARGUMENTS, "typedef float Number;\n"),
}
"""For rows of each dtype."""


def available(rows: Tensor, factor: torch.dtype) -> bool:
    """Whether the functions below multiply `rows` with a factor of `dtype`."""
    return (
        rows.numel() > 0
        and rows.device.type == "cpu"
        and factor == torch.float32
        and rows.dtype in _KERNELS
        and is_built(rows.dtype)
    )


def is_built(rows: torch.dtype) -> bool:
    """Whether this CPU and the compiler have what the functions below need for such rows."""
    return _KERNELS[rows].function() is not None


def builds(rows: torch.dtype) -> list[Callable[[], object]]:
    """Return the calls that build the C++ for `rows` of a dtype."""
    return [_KERNELS[rows].function] if rows in _KERNELS else []


def product(x: Tensor, factor: Tensor, out: Tensor, scaling: float) -> None:
    """Write out = scaling * x @ factorᵀ: x [M, K] of contiguous rows, float32 factor [R, K],
    float32 out [M, R] of contiguous rows."""
    _run(0, x, factor, factor.shape[0], factor.stride(), out, scaling)


def gradient(low: Tensor, x: Tensor, out: Tensor) -> None:
    """Write out = lowᵀ @ x: float32 low [M, R] and x [M, K] of contiguous rows, float32 out [R,
    K]."""
    _run(1, x, low, low.shape[1], low.stride(), out)


def add_product(total: Tensor, low: Tensor, factor: Tensor) -> None:
    """Add low @ factor, exact to 2^-17 of the product, to total: total [M, N] and float32 low
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
    """Run an `operation` of thin_kernel.cpp."""
    kernel = _KERNELS[rows.dtype].function()
    assert kernel is not None
    threads = torch.get_num_threads()
    shape = (rows.stride(0), *rows.shape)
    kernel(operation, rows, *shape, factor, rank, *steps, out, *out.stride(), scaling, threads)
