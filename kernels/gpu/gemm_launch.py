"""Launches of the product with a weight, in either direction: outputs, grids and arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qlora_compile.kernels.gpu.adapter_operands import AdapterStart
from qlora_compile.kernels.gpu.configs import GemmConfig
from qlora_compile.kernels.gpu.gemm import gemm_kernel
from qlora_compile.kernels.gpu.launch import TRITON_DTYPES, Launch, with_contiguous_rows
from qlora_compile.kernels.gpu.packed_operand import WeightOperand, dense_operand, packed_operand
from qlora_compile.kernels.variants.base import LinearSpec

GROUP_M = 8
"""How many rows of tiles have programs that run together."""

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
    """Write out = x Wᵀ + bias + adapter, or backward out = x W + adapter; `accumulate` adds to out.

    x: [M, R], R = K forward and N backward, contiguous rows. planes: the packed weight's, or [W] if
    the config has no decoder. out: [M, C], contiguous rows.
    """
    rows, columns = out.shape
    if not rows:
        return
    weight = weight_operand(planes, spec, config, backward)
    target = out
    if config.splits > 1:
        target = out.new_empty(config.splits, rows, columns, dtype=torch.float32)
    tiles = -(-rows // config.block_m) * -(-columns // config.block_c)
    launch_product(
        *(gemm_kernel, (tiles, config.splits), config, spec.compute_dtype),
        *(x, weight, (spec.n, spec.k), target),
        backward=backward,
        width=0 if adapter is None else adapter.low.values.shape[1],
        arguments={
            "weight_stride": weight.weight.stride(0) if config.decoder is None else None,
            "bias": bias,
            **_adapter_arguments(adapter),
            "out_stride_split": target.stride(0) if config.splits > 1 else 0,
            "M": rows,
        },
        constexprs={
            "SPLITS": config.splits,
            "AHEAD": 2 if weight.looks_up else int(config.prefetch),
            "ACCUMULATE": accumulate and config.splits == 1,
        },
    )
    if config.splits > 1:
        total = target.sum(0)
        out.add_(total) if accumulate else out.copy_(total)


def weight_operand(
    planes: Sequence[Tensor], spec: LinearSpec, config: GemmConfig, backward: bool
) -> WeightOperand:
    """Return the weight stored in `planes` as the config's kernels take it in the direction."""
    if config.decoder is None:
        return dense_operand(planes[0])
    tile_columns = config.block_c if backward else config.block_r
    return packed_operand(
        *(spec.layout, planes, config.decoder, spec.compute_dtype, tile_columns),
        prepares=not config.inline,
    )


def launch_product(
    kernel: Any,
    grid: tuple[int, ...],
    config: GemmConfig,
    dtype: torch.dtype,
    x: Tensor,
    weight: WeightOperand,
    shape: tuple[int, int],
    out: Tensor,
    *,
    backward: bool,
    width: int,
    arguments: dict[str, Any],
    constexprs: dict[str, Any],
) -> None:
    """Launch `gemm_kernel` or `grouped_gemm_kernel` for x and a weight of `shape` (N, K), in
    `dtype`.

    width: columns of the adapter's operands. arguments, constexprs: those of this kernel only.
    """
    n, k = shape
    tile_rows = config.block_r if backward else config.block_c
    tile_columns = config.block_c if backward else config.block_r
    x, x_argument = _x_operand(x, config, dtype)
    # The width is a multiple of sixteen.
    block = math.gcd(width, _LARGEST_WIDTH_BLOCK) or 16
    shared = {
        "x": x_argument,
        "x_stride": x.stride(0),
        "weight": weight.weight,
        **weight.arguments,
        "out": out,
        "out_stride": out.stride(-2),
        "N": n,
        "K": k,
        "width": width,
    }
    shared_constexprs = {
        **weight.constexprs,
        "DTYPE": TRITON_DTYPES[dtype],
        "BACKWARD": backward,
        "BM": config.block_m,
        "BC": config.block_c,
        "BR": config.block_r,
        "BWIDTH": block,
        "CHUNKS": width // block,
        "GROUP_M": GROUP_M,
        "WEIGHT_LEFT": config.weight_left,
        "DESCRIPTOR": x_argument is not x,
        "PREFETCH": config.prefetch,
        "EVEN_N": n % tile_rows == 0,
        "EVEN_K": k % tile_columns == 0,
        "STAGES": config.loop_stages,
    }
    Launch(
        kernel,
        grid,
        shared | arguments,
        shared_constexprs | constexprs,
        config.num_warps,
        config.num_stages,
        {} if config.max_registers is None else {"maxnreg": config.max_registers},
    ).run()


def _x_operand(
    x: Tensor, config: GemmConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor | TensorDescriptor]:
    """Return x [M, R] with contiguous rows, and the kernel's argument for it: x itself, or a
    descriptor of its tiles if the config wants one and x, in `dtype`, can have one."""
    x = with_contiguous_rows(x)
    if not config.descriptor or x.dtype != dtype or x.shape[1] % 8:
        return x, x
    # A descriptor's rows begin at multiples of 16 bytes. A meta tensor's address is 0.
    if x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    tile = [config.block_m, config.block_r]
    return x, TensorDescriptor(x, list(x.shape), [x.stride(0), 1], tile)


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
