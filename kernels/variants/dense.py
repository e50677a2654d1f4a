"""dense: dequantise the weight, multiply with the vendor GEMM, add the adapter by addmm.

Native torch ops only, so it runs on every device; the baseline for the others.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.variants.base import (
    LinearGradients,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    Variant,
)
from qlora_compile.problem import Problem

ROW_BLOCK = 256
"""Rows converted at a time where an operand's dtype differs from the GEMM's: such a block stays in
a CPU's L2 cache at usual widths, and no [M, K] or [M, N] copy is made."""


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    # Without native support torch multiplies bfloat16 about ten times slower than float32, and
    # float16 on any CPU several times slower.
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which `device` multiplies `dtype` operands without loss of accuracy or speed."""
    low_precision = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cpu" and low_precision and not _cpu_multiplies(dtype):
        return torch.float32
    return dtype


def _row_blocks(rows: int, whole: bool) -> list[tuple[int, int]]:
    step = max(rows, 1) if whole else ROW_BLOCK
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _adapter_input(tensors: LinearTensors, spec: LinearSpec, rows: tuple[int, int], dtype):
    """Rows of drop(x) in `dtype`, and the factors the dropout applied (None without dropout)."""
    x = tensors.x[rows[0] : rows[1]].to(dtype)
    if tensors.seed is None:
        return x, None
    keep = keep_mask(tensors.seed, spec.stream, spec.dropout, rows, spec.k)
    factors = keep.to(dtype).mul_(1.0 / (1.0 - spec.dropout))
    return x * factors, factors


class Dense(Variant):
    name = "dense"

    def rejects(self, problem: Problem) -> list[str]:
        return []

    def forward(self, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        x, device = tensors.x, tensors.x.device
        base_dtype = gemm_dtype(spec.compute_dtype, device)
        lora_dtype = gemm_dtype(spec.lora_dtype, device)
        weight = spec.dequantize(tensors.planes, base_dtype).t()
        bias = None if tensors.bias is None else tensors.bias.to(base_dtype)
        if tensors.lora_a is not None and tensors.lora_b is not None:
            lora_a = tensors.lora_a.to(lora_dtype).t()
            lora_b = tensors.lora_b.to(lora_dtype).t()
        else:
            lora_a = lora_b = None

        def block(rows: tuple[int, int]) -> Tensor:
            base_x = x[rows[0] : rows[1]].to(base_dtype)
            y = base_x @ weight if bias is None else torch.addmm(bias, base_x, weight)
            if lora_a is None or lora_b is None:
                return y
            low_rank = _adapter_input(tensors, spec, rows, lora_dtype)[0] @ lora_a
            if y.dtype == lora_dtype:
                return y.addmm_(low_rank, lora_b, alpha=spec.scaling)
            return (low_rank @ lora_b).mul_(spec.scaling).add_(y)

        converts = {x.dtype, base_dtype, spec.out_dtype} != {base_dtype}
        adapter_converts = lora_a is not None and (
            lora_dtype != base_dtype or tensors.seed is not None
        )
        blocks = _row_blocks(x.shape[0], whole=not (converts or adapter_converts))
        if len(blocks) == 1:
            return block(blocks[0]).to(spec.out_dtype)
        y = x.new_empty(x.shape[0], spec.n, dtype=spec.out_dtype)
        for rows in blocks:
            y[rows[0] : rows[1]] = block(rows)
        return y

    def backward(
        self, grad: Tensor, tensors: LinearTensors, spec: LinearSpec, needs: NeedsGradient
    ) -> LinearGradients:
        x, a, b = tensors.x, tensors.lora_a, tensors.lora_b
        device = x.device
        base_dtype = gemm_dtype(spec.compute_dtype, device)
        lora_dtype = gemm_dtype(spec.lora_dtype, device)
        weight = spec.dequantize(tensors.planes, base_dtype) if needs.x else None
        if a is not None and b is not None:
            lora_a, lora_b = a.to(lora_dtype), b.to(lora_dtype)
            # Block sums are accumulated in at least float32.
            grad_a, grad_b = (
                torch.zeros_like(t, dtype=torch.promote_types(torch.float32, t.dtype))
                for t in (a, b)
            )
        else:
            lora_a = lora_b = grad_a = grad_b = None
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs.x else None

        same_dtype = {x.dtype, grad.dtype, base_dtype} == {base_dtype}
        adapter_plain = lora_a is None or (lora_dtype == base_dtype and tensors.seed is None)
        for rows in _row_blocks(x.shape[0], whole=same_dtype and adapter_plain):
            block = slice(*rows)
            grad_y = grad[block]
            block_x = grad_y.to(base_dtype) @ weight if weight is not None else None
            if lora_a is not None and lora_b is not None:
                adapter_grad = grad_y.to(lora_dtype)
                grad_low_rank = (adapter_grad @ lora_b).mul_(spec.scaling)
                if needs.adapter and grad_a is not None and grad_b is not None:
                    dropped, factors = _adapter_input(tensors, spec, rows, lora_dtype)
                    low_rank = (dropped @ lora_a.t()).mul_(spec.scaling)
                    _accumulate(grad_a, grad_low_rank, dropped)
                    _accumulate(grad_b, adapter_grad, low_rank)
                elif tensors.seed is not None and block_x is not None:
                    factors = _adapter_input(tensors, spec, rows, lora_dtype)[1]
                else:
                    factors = None
                if block_x is not None:
                    if factors is None and block_x.dtype == lora_dtype:
                        block_x.addmm_(grad_low_rank, lora_a)
                    else:
                        adapter_x = grad_low_rank @ lora_a
                        if factors is not None:
                            adapter_x.mul_(factors)
                        block_x = adapter_x.add_(block_x)
            if grad_x is not None and block_x is not None:
                grad_x[block] = block_x
        return LinearGradients(
            x=grad_x,
            lora_a=grad_a.to(a.dtype) if needs.adapter and a is not None else None,
            lora_b=grad_b.to(b.dtype) if needs.adapter and b is not None else None,
            bias=(
                grad.sum(0, dtype=torch.promote_types(torch.float32, grad.dtype)).to(
                    tensors.bias.dtype
                )
                if needs.bias and tensors.bias is not None
                else None
            ),
        )


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ @ right."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total.add_(left.t() @ right)
