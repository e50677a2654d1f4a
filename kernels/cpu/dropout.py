"""Dropout of rows by vector instructions, with the masks of `kernels.dropout.keep_mask`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.native import NativeKernel
from qlora_compile.kernels.dropout import dropout_threshold

_BYTES = (2, 4)
"""Of an element."""

_KERNEL = NativeKernel(
    tuple((level, ("dropout",)) for level in ("avx512", "avx2")),
    (
        *("int64_t", "int64_t", "const int64_t*", "int64_t", "int64_t", "int64_t"),
        *("const uint8_t*", "int64_t", "int64_t", "int64_t", "uint8_t*", "int64_t", "int64_t"),
    ),
    "#include <algorithm>\n",
)


def available(rows: Tensor) -> bool:
    """Whether the functions below take `rows`."""
    return (
        rows.numel() > 0
        and rows.device.type == "cpu"
        and rows.dtype.itemsize in _BYTES
        and is_built()
    )


def is_built() -> bool:
    """Whether this CPU and the compiler have what the functions below need."""
    return _KERNEL.function() is not None


def builds() -> list[Callable[[], object]]:
    """Return the calls that build the C++."""
    return [_KERNEL.function]


def dropped(x: Tensor, seed: Tensor, stream: int, probability: float, first: int = 0) -> Tensor:
    """Return x [m, K], contiguous, with 0 for dropped elements; kept ones are not scaled. first:
    the number of x's first row among the rows that a mask is drawn for. seed: int64 [1]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(x, out, seed, stream, probability, first, fills=True)
    return out


def put(
    x: Tensor, out: Tensor, seed: Tensor, stream: int, probability: float, first: int = 0
) -> None:
    """Write the kept elements of x [m, K] to `out` [m, K], whose rows are contiguous, and keep the
    other elements of `out`. The rest is as `dropped` takes it."""
    _run(x, out, seed, stream, probability, first, fills=False)


def _run(
    x: Tensor,
    out: Tensor,
    seed: Tensor,
    stream: int,
    probability: float,
    first: int,
    *,
    fills: bool,
) -> None:
    threshold = dropout_threshold(probability)
    if threshold == 0:
        out.copy_(x)
        return
    kernel = _KERNEL.function()
    assert kernel is not None
    x = x if x.stride(1) == 1 else x.contiguous()
    m, k = x.shape
    given = (seed, stream, threshold, first * k, x, x.stride(0), m, k, out, out.stride(0))
    kernel(x.dtype.itemsize, int(fills), *given, torch.get_num_threads())
