"""An adapter's thin products of bfloat16 rows with a float32 factor, without a float32 copy of the
rows: by AMX's tiles where the CPU has them, else by float32 vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.native import NativeKernel

_KERNEL = NativeKernel(
    sources=(
        ("amx", ("tiles", "tiles_amx", "thin_amx", "thin_kernel")),
        ("avx512", ("vectors", "thin", "thin_kernel")),
        ("avx2", ("vectors", "thin", "thin_kernel")),
    ),
    arguments=(
        *("int64_t", "uint16_t*", "int64_t", "int64_t", "int64_t"),
        *("const float*", "int64_t", "int64_t", "int64_t"),
        *("float*", "int64_t", "int64_t", "float", "int64_t"),
    ),
)


def available(rows: Tensor, factor: torch.dtype) -> bool:
    """Whether the functions below multiply `rows` with a factor of `dtype`."""
    return (
        rows.numel() > 0
        and rows.device.type == "cpu"
        and rows.dtype == torch.bfloat16
        and factor == torch.float32
        and is_built()
    )


def is_built() -> bool:
    """Whether this CPU and the compiler have what the functions below need."""
    return _KERNEL.function() is not None


def product(x: Tensor, factor: Tensor, out: Tensor, scaling: float) -> None:
    """Write out = scaling * x @ factorᵀ: bfloat16 x [M, K] of contiguous rows, float32 factor [R,
    K], float32 out [M, R] of contiguous rows."""
    _run(0, x, factor, factor.shape[0], factor.stride(), out, scaling)


def gradient(low: Tensor, x: Tensor, out: Tensor) -> None:
    """Write out = lowᵀ @ x: float32 low [M, R] and bfloat16 x [M, K] of contiguous rows, float32
    out [R, K]."""
    _run(1, x, low, low.shape[1], low.stride(), out)


def add_product(total: Tensor, low: Tensor, factor: Tensor) -> None:
    """Add low @ factor, exact to 2^-17 of the product, to total: bfloat16 total [M, N] and float32
    low [M, R] of contiguous rows, float32 factor [R, N]."""
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
    kernel = _KERNEL.function()
    assert kernel is not None
    threads = torch.get_num_threads()
    shape = (rows.stride(0), *rows.shape)
    kernel(operation, rows, *shape, factor, rank, *steps, out, *out.stride(), scaling, threads)
