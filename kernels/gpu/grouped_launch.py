"""Launches of the experts' products: forward, and the gradients, for one GemmConfig."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlora_compile.kernels.call import NeedsGradient
from qlora_compile.kernels.experts.base import ExpertsSpec, ExpertsTensors
from qlora_compile.kernels.gpu.configs import GemmConfig, adapter_width
from qlora_compile.kernels.gpu.gemm_launch import launch_product, weight_operand
from qlora_compile.kernels.gpu.grouped_gemm import grouped_gemm_kernel, grouped_gradient_kernel
from qlora_compile.kernels.gpu.launch import Launch, with_contiguous_rows
from qlora_compile.kernels.gpu.packed_operand import WeightOperand, dense_operand
from qlora_compile.kernels.variants.base import LinearGradients

_THIN = GemmConfig(64, 64, 64, 4, 3)
"""The config of an adapter's thin products, whose outputs have no more columns than its rank."""


def grouped_forward(tensors: ExpertsTensors, spec: ExpertsSpec, config: GemmConfig) -> Tensor:
    """Return y [S, N] in `spec.out_dtype`, zero in the rows past the last offset.

    config: its decoder is one of the format's, None for a plain weight; `splits` is ignored.
    Products run in `spec.compute_dtype`, of 16 bits.
    """
    x = tensors.x
    adapter = None
    if tensors.lora_a is not None and tensors.lora_b is not None:
        a, b = _padded(tensors.lora_a, 1, spec), _padded(tensors.lora_b, 2, spec)
        adapter = _thin(x, a, tensors, spec, config), b
    y = x.new_empty(x.shape[0], spec.n, dtype=spec.out_dtype)
    weight = weight_operand(tensors.planes, spec, config, backward=False)
    bias = None if tensors.bias is None else tensors.bias.contiguous()
    shape = (spec.n, spec.k)
    _gemm(x, weight, shape, tensors.offsets, spec, config, y, bias=bias, adapter=adapter)
    return y


def grouped_backward(
    grad: Tensor,
    tensors: ExpertsTensors,
    spec: ExpertsSpec,
    config: GemmConfig,
    needs: NeedsGradient,
) -> LinearGradients:
    """Return gradients for `grad` [S, N], as `ExpertsVariant.backward`; config as of
    `grouped_forward`."""
    x, a, b, offsets = tensors.x, tensors.lora_a, tensors.lora_b, tensors.offsets
    adapter = grad_x = grad_a = grad_b = None
    if a is not None and b is not None:
        up = _padded(a.transpose(1, 2), 2, spec)
        wide = _padded(b, 2, spec).transpose(1, 2)
        grad_low = _thin(grad, wide, tensors, spec, config)
        adapter = grad_low, up
        if needs.adapter:
            low = _thin(x, up.transpose(1, 2), tensors, spec, config)
            grad_a = torch.empty_like(a, memory_format=torch.contiguous_format)
            grad_b = torch.empty_like(b, memory_format=torch.contiguous_format)
            _gradient(x, grad_low, offsets, grad_a.transpose(1, 2))
            _gradient(grad, low, offsets, grad_b)
    if needs.x:
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        weight = weight_operand(tensors.planes, spec, config, backward=True)
        shape = (spec.n, spec.k)
        _gemm(grad, weight, shape, offsets, spec, config, grad_x, backward=True, adapter=adapter)
    return LinearGradients(grad_x, grad_a, grad_b)


def _padded(factor: Tensor, dimension: int, spec: ExpertsSpec) -> Tensor:
    """Return factor [E, …] of any strides, its rank at `dimension`, contiguous in the compute dtype
    and padded with zeros."""
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
    """Return scaling * x [S, R] @ factor[e] [width, R]ᵀ, [S, width] in the compute dtype."""
    width = factor.shape[1]
    block_c = min(1 << (width - 1).bit_length(), _THIN.block_c)
    thin = replace(_THIN, block_m=min(config.block_m, _THIN.block_m), block_c=block_c)
    out = x.new_empty(x.shape[0], width, dtype=spec.compute_dtype)
    shape = (width, factor.shape[2])
    weight, offsets = dense_operand(factor), tensors.offsets
    _gemm(x, weight, shape, offsets, spec, thin, out, scaling=tensors.scaling)
    return out


def _gemm(
    x: Tensor,
    weight: WeightOperand,
    shape: tuple[int, int],
    offsets: Tensor,
    spec: ExpertsSpec,
    config: GemmConfig,
    out: Tensor,
    *,
    backward: bool = False,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    scaling: Tensor | None = None,
) -> None:
    """Launch one product. weight: packed, or [E, N, K]; shape: (N, K). adapter: low [S, width] and
    up [E, C, width], whose product low upᵀ is added; both contiguous, in the compute dtype, and
    padded with zeros to what a tensor core takes."""
    (rows, columns), experts = out.shape, offsets.shape[0]
    if not rows:
        return
    strides = weight.weight.stride() if config.decoder is None else (None, None, None)
    tiles = rows // config.block_m + experts + 1
    low, up = adapter or (None, None)
    launch_product(
        *(grouped_gemm_kernel, (tiles * -(-columns // config.block_c),), config),
        *(spec.compute_dtype, x, weight, shape, out),
        backward=backward,
        width=0 if low is None else low.shape[1],
        arguments={
            "offsets": offsets,
            "experts": experts,
            "weight_stride_e": strides[0],
            "weight_stride_n": strides[1],
            "weight_stride_k": strides[2],
            "bias": bias,
            "low": low,
            "up": up,
            "scaling": scaling,
            "S": rows,
            "tiles": tiles,
        },
        constexprs={"BE": 1 << experts.bit_length()},
    )


def _gradient(z: Tensor, low: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Write z [S, C]ᵀ @ low [S, width] over each expert's rows, without the padding, to out
    [E, C, rank] of any strides and dtype."""
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
