"""Launches of the experts' products: forward, and the gradients, for one GemmConfig."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.experts.base import ExpertsGradients, ExpertsSpec, ExpertsTensors
from qlora_compile.kernels.gpu.configs import GemmConfig, adapter_width
from qlora_compile.kernels.gpu.gemm_launch import GROUP_M, width_blocks, x_operand
from qlora_compile.kernels.gpu.grouped_gemm import grouped_gemm_kernel, grouped_gradient_kernel
from qlora_compile.kernels.gpu.launch import TRITON_DTYPES, Launch, with_contiguous_rows
from qlora_compile.kernels.gpu.packed_operand import (
    WeightOperand,
    dense_operand,
    packed_operand,
)

_THIN = GemmConfig(64, 64, 64, 4, 3)
"""Of the adapter's products, whose output has the rank's columns."""


@dataclass(frozen=True)
class _Adapter:
    """What is added to a product: low [S, width] times up [E, C, width], transposed, both
    contiguous, in the compute dtype, and padded with zeros to what a tensor core takes."""

    low: Tensor
    up: Tensor


def grouped_forward(tensors: ExpertsTensors, spec: ExpertsSpec, config: GemmConfig) -> Tensor:
    """y [S, N] in `spec.out_dtype`, zero in the rows past the last offset.

    config: its decoder is one of the format's, None for a plain weight; `splits` is not looked at.
    Products run in `spec.compute_dtype`, of 16 bits.
    """
    x = tensors.x
    adapter = None
    if tensors.lora_a is not None and tensors.lora_b is not None:
        a, b = _padded(tensors.lora_a, 1, spec), _padded(tensors.lora_b, 2, spec)
        adapter = _Adapter(_thin(x, a, tensors, spec, config), b)
    y = x.new_empty(x.shape[0], spec.n, dtype=spec.out_dtype)
    _weight_product(x, tensors, spec, config, y, adapter=adapter)
    return y


def grouped_backward(
    grad: Tensor,
    tensors: ExpertsTensors,
    spec: ExpertsSpec,
    config: GemmConfig,
    *,
    needs_x: bool,
    needs_adapter: bool,
) -> ExpertsGradients:
    """Gradients for `grad` [S, N], as `ExpertsVariant.backward`; config as of `grouped_forward`."""
    x, a, b = tensors.x, tensors.lora_a, tensors.lora_b
    adapter = grad_x = grad_a = grad_b = None
    if a is not None and b is not None:
        up = _padded(a.transpose(1, 2), 2, spec)
        wide = _padded(b, 2, spec).transpose(1, 2)
        grad_low = _thin(grad, wide, tensors, spec, config)
        adapter = _Adapter(grad_low, up)
        if needs_adapter:
            low = _thin(x, up.transpose(1, 2), tensors, spec, config)
            grad_a = torch.empty_like(a, memory_format=torch.contiguous_format)
            grad_b = torch.empty_like(b, memory_format=torch.contiguous_format)
            _gradient(x, grad_low, tensors.offsets, grad_a.transpose(1, 2))
            _gradient(grad, low, tensors.offsets, grad_b)
    if needs_x:
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        _weight_product(grad, tensors, spec, config, grad_x, adapter=adapter, backward=True)
    return ExpertsGradients(grad_x, grad_a, grad_b)


def _weight_product(
    x: Tensor,
    tensors: ExpertsTensors,
    spec: ExpertsSpec,
    config: GemmConfig,
    out: Tensor,
    *,
    adapter: _Adapter | None,
    backward: bool = False,
) -> None:
    bias = None if backward or tensors.bias is None else tensors.bias.contiguous()
    if config.decoder is None:
        weight = dense_operand(tensors.planes[0])
    else:
        tile_columns = config.block_c if backward else config.block_r
        weight = packed_operand(
            *(spec.layout, tensors.planes, config.decoder, spec.compute_dtype, tile_columns),
            prepares=not config.inline,
        )
    shape = (spec.n, spec.k)
    _gemm(x, weight, shape, tensors.offsets, spec, config, out, backward, bias, adapter)


def _padded(factor: Tensor, dimension: int, spec: ExpertsSpec) -> Tensor:
    """factor [E, …] of any strides, its rank at `dimension`, contiguous in the compute dtype and
    padded with zeros."""
    shape = list(factor.shape)
    rank = shape[dimension]
    shape[dimension] = adapter_width(rank, spec.compute_dtype, spec.compute_dtype)
    if shape[dimension] == rank:
        return factor.to(spec.compute_dtype).contiguous()
    padded = factor.new_zeros(shape, dtype=spec.compute_dtype)
    padded.narrow(dimension, 0, rank).copy_(factor)
    return padded


def _thin(
    x: Tensor, factor: Tensor, tensors: ExpertsTensors, spec: ExpertsSpec, config: GemmConfig
) -> Tensor:
    """scaling * x [S, R] @ factor[e] [width, R]ᵀ, [S, width] in the compute dtype."""
    width = factor.shape[1]
    block_c = min(1 << (width - 1).bit_length(), _THIN.block_c)
    thin = replace(_THIN, block_m=min(config.block_m, _THIN.block_m), block_c=block_c)
    out = x.new_empty(x.shape[0], width, dtype=spec.compute_dtype)
    shape = (width, factor.shape[2])
    _gemm(
        x, dense_operand(factor), shape, tensors.offsets, spec, thin, out, scaling=tensors.scaling
    )
    return out


def _gemm(
    x: Tensor,
    weight: WeightOperand,
    shape: tuple[int, int],
    offsets: Tensor,
    spec: ExpertsSpec,
    config: GemmConfig,
    out: Tensor,
    backward: bool = False,
    bias: Tensor | None = None,
    adapter: _Adapter | None = None,
    scaling: Tensor | None = None,
) -> None:
    """One launch. weight: packed, or [E, N, K]; shape: (N, K)."""
    n, k = shape
    (rows, columns), experts = out.shape, offsets.shape[0]
    if not rows:
        return
    strides = weight.weight.stride() if config.decoder is None else (None, None, None)
    x, x_argument = x_operand(x, config, spec.compute_dtype)
    tiles = rows // config.block_m + experts + 1
    width = 0 if adapter is None else adapter.low.shape[1]
    tile_rows = config.block_r if backward else config.block_c
    tile_columns = config.block_c if backward else config.block_r
    arguments: dict[str, Any] = {
        "x": x_argument,
        "x_stride": x.stride(0),
        "offsets": offsets,
        "experts": experts,
        "weight": weight.weight,
        "weight_stride_e": strides[0],
        "weight_stride_n": strides[1],
        "weight_stride_k": strides[2],
        **weight.arguments,
        "bias": bias,
        "low": None if adapter is None else adapter.low,
        "up": None if adapter is None else adapter.up,
        "scaling": scaling,
        "out": out,
        "out_stride": out.stride(0),
        "S": rows,
        "N": n,
        "K": k,
        "width": width,
        "tiles": tiles,
    }
    constexprs = {
        **weight.constexprs,
        "DTYPE": TRITON_DTYPES[spec.compute_dtype],
        "BACKWARD": backward,
        "BE": 1 << experts.bit_length(),
        "BM": config.block_m,
        "BC": config.block_c,
        "BR": config.block_r,
        **width_blocks(width),
        "GROUP_M": GROUP_M,
        "WEIGHT_LEFT": config.weight_left,
        "DESCRIPTOR": x_argument is not x,
        "PREFETCH": config.prefetch,
        "EVEN_N": n % tile_rows == 0,
        "EVEN_K": k % tile_columns == 0,
        "STAGES": config.loop_stages,
    }
    options = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    grid = (tiles * -(-columns // config.block_c),)
    Launch(
        grouped_gemm_kernel,
        grid,
        arguments,
        constexprs,
        config.num_warps,
        config.num_stages,
        options,
    ).run()


def _gradient(z: Tensor, low: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out [E, C, rank], any strides and dtype: z [S, C]ᵀ @ low [S, width] over each expert's rows,
    without the padding."""
    z = with_contiguous_rows(z)
    columns, rank = out.shape[1:]
    block_m, block_c = 32, 64
    block_rank = min(64, max(16, 1 << (rank - 1).bit_length()))
    arguments = {
        "z": z,
        "z_stride": z.stride(0),
        "low": low,
        "low_stride": low.stride(0),
        "offsets": offsets,
        "out": out,
        "out_stride_e": out.stride(0),
        "out_stride_c": out.stride(1),
        "out_stride_r": out.stride(2),
        "C": columns,
        "rank": rank,
    }
    constexprs = {
        "BM": block_m,
        "BC": block_c,
        "BRANK": block_rank,
        "EVEN_C": columns % block_c == 0,
    }
    grid = (offsets.shape[0], -(-columns // block_c), -(-rank // block_rank))
    Launch(grouped_gradient_kernel, grid, arguments, constexprs).run()
