"""Decoding to bfloat16 on CPU in one pass over the codes, which Inductor compiles.

torch's own operators take five passes, each through the caches: widen, look up, scale, round, copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST = 1 << 14
"""Weights that are worth a compiled call."""


def decodes(out: Tensor, block_size: int) -> bool:
    """Whether `out` [elements] can be written so in blocks."""
    return (
        out.dtype == torch.bfloat16
        and out.device.type == "cpu"
        and out.numel() >= max(SMALLEST, block_size)
        and block_size % 2 == 0
        and out.storage_offset() % 2 == 0
        and _has_compiler()
    )


@functools.cache
def _has_compiler() -> bool:
    # Inductor imports Triton, which decides at that moment whether it interprets kernels.
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


def write_pairs(codes: Tensor, scales: Tensor, high: Tensor, low: Tensor, out: Tensor) -> None:
    """out[b, 2 i] = high[codes[b, i]] * scales[b] and out[b, 2 i + 1] = low[codes[b, i]] *
    scales[b]: codes uint8 [blocks, bytes], scales float32 [blocks], high and low float32 [256],
    out bfloat16 [blocks, 2 * bytes]."""
    _compiled(_write_pairs)(codes, scales, high, low, out.view(torch.int32))


def write_products(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """out = codes * scales[:, None]: codes int8 [blocks, size], scales float32 [blocks]."""
    _compiled(_write_products)(codes, scales, out)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    # Beyond Dynamo's limit of recompilations (threads, deterministic and inference mode are each a
    # reason for one) it runs uncompiled: the same bits, slower.
    return torch.compile(function, dynamic=True)


def _write_pairs(codes: Tensor, scales: Tensor, high: Tensor, low: Tensor, out: Tensor) -> None:
    index, scale = codes.to(torch.int32), scales.unsqueeze(1)
    first, second = _rounded(high[index] * scale), _rounded(low[index] * scale)
    out.copy_((second << 16) | (first & 0xFFFF))


def _rounded(value: Tensor) -> Tensor:
    """The bits of finite float32 values in bfloat16, to nearest even, in an int32's lower half:
    integer arithmetic, which Inductor computes in vectors as it does not a cast to 16 bits."""
    bits = value.view(torch.int32)
    return (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16


def _write_products(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    out.copy_(codes.to(torch.float32) * scales.unsqueeze(1))
