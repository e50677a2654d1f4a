"""One launch of the GEMM kernel: output, grid and arguments for either direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qlora_compile.kernels.gpu.configs import GemmConfig
from qlora_compile.kernels.gpu.gemm import gemm_kernel
from qlora_compile.kernels.gpu.launch import TRITON_DTYPES, Launch, with_contiguous_rows
from qlora_compile.kernels.gpu.packed_operand import dense_operand, packed_operand
from qlora_compile.kernels.gpu.products import AdapterStart
from qlora_compile.kernels.variants.base import LinearSpec

GROUP_M = 8
"""Rows of tiles whose programs run together."""

_LARGEST_WIDTH_BLOCK = 64


def gemm(
    x: Tensor,
    planes: Sequence[Tensor],
    spec: LinearSpec,
    config: GemmConfig,
    out: Tensor,
    *,
    backward: bool = False,
    bias: Tensor | None = None,
    adapter: AdapterStart | None = None,
    accumulate: bool = False,
) -> None:
    """out = x Wᵀ + bias + adapter, or backward out = x W + adapter; added to out to `accumulate`.

    x: [M, R], R = K forward and N backward, contiguous rows. planes: the packed weight's, or
    [W] where the config has no decoder. out: [M, C], contiguous rows.
    """
    rows, columns = out.shape
    if not rows:
        return
    tile_rows = config.block_r if backward else config.block_c
    tile_columns = config.block_c if backward else config.block_r
    if config.decoder is None:
        weight = dense_operand(planes[0])
    else:
        weight = packed_operand(
            *(spec.layout, planes, config.decoder, spec.compute_dtype, tile_columns),
            prepares=not config.inline,
        )
    x, x_argument = x_operand(x, config, spec.compute_dtype)
    target = out
    if config.splits > 1:
        target = out.new_empty(config.splits, rows, columns, dtype=torch.float32)
    tiles = -(-rows // config.block_m) * -(-columns // config.block_c)
    width = 0 if adapter is None else adapter.low.values.shape[1]
    arguments: dict[str, Any] = {
        "x": x_argument,
        "x_stride": x.stride(0),
        "weight": weight.weight,
        "weight_stride": weight.weight.stride(0) if config.decoder is None else None,
        **weight.arguments,
        "bias": bias,
        **_adapter_arguments(adapter),
        "out": target,
        "out_stride": target.stride(-2),
        "out_stride_split": target.stride(0) if config.splits > 1 else 0,
        "M": rows,
        "N": spec.n,
        "K": spec.k,
        "width": width,
    }
    constexprs = {
        **weight.constexprs,
        "DTYPE": TRITON_DTYPES[spec.compute_dtype],
        "BACKWARD": backward,
        "BM": config.block_m,
        "BC": config.block_c,
        "BR": config.block_r,
        **width_blocks(width),
        "GROUP_M": GROUP_M,
        "SPLITS": config.splits,
        "WEIGHT_LEFT": config.weight_left,
        "DESCRIPTOR": x_argument is not x,
        "PREFETCH": config.prefetch,
        "AHEAD": 2 if weight.looks_up else int(config.prefetch),
        "EVEN_N": spec.n % tile_rows == 0,
        "EVEN_K": spec.k % tile_columns == 0,
        "STAGES": config.loop_stages,
        "ACCUMULATE": accumulate and config.splits == 1,
    }
    options = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    Launch(
        gemm_kernel,
        (tiles, config.splits),
        arguments,
        constexprs,
        config.num_warps,
        config.num_stages,
        options,
    ).run()
    if config.splits > 1:
        total = target.sum(0)
        out.add_(total) if accumulate else out.copy_(total)


def x_operand(
    x: Tensor, config: GemmConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor | TensorDescriptor]:
    """x [M, R] with contiguous rows, and what a kernel whose products are in `dtype` gets for it:
    itself, or a descriptor of its tiles where the config wants one and x can have it."""
    x = with_contiguous_rows(x)
    if not config.descriptor or x.dtype != dtype or x.shape[1] % 8:
        return x, x
    # A descriptor's rows begin at multiples of 16 bytes.
    if x.stride(0) * x.element_size() % 16 or x.storage_offset() % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    tile = [config.block_m, config.block_r]
    return x, TensorDescriptor(x, list(x.shape), [x.stride(0), 1], tile)


def width_blocks(width: int) -> dict[str, int]:
    """How a kernel cuts an adapter's `width`, which is padded to a multiple of sixteen."""
    block = math.gcd(width, _LARGEST_WIDTH_BLOCK) or 16
    return {"BWIDTH": block, "CHUNKS": width // block}


def _adapter_arguments(adapter: AdapterStart | None) -> dict[str, Any]:
    if adapter is None:
        return dict.fromkeys(("low", "low_scale", "up", "up_scale", "bits"))
    return {
        "low": adapter.low.values,
        "low_scale": adapter.low.scale,
        "up": adapter.up.values,
        "up_scale": adapter.up.scale,
        "bits": adapter.bits,
    }
