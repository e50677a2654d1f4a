"""The adapter's thin products and gradients in torch's own operators, over blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.variants.base import (
    ROW_BLOCK,
    LinearSpec,
    LinearTensors,
    adapter_scaling,
)

DEVICE_ROW_BLOCKS = 8
"""CPU row blocks in one of another device, where each costs a dozen kernel launches."""

Totals = tuple[Tensor, Tensor]
"""Sums of the gradients of lora_a and lora_b over blocks of rows, in at least float32."""


def native_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    """Those a CPU may multiply operands of `dtype` in without losing accuracy, its own way first:
    without native support torch multiplies 16-bit ones several times slower than float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return [dtype]
    native = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [dtype, torch.float32] if native else [torch.float32, dtype]


def row_blocks(x: Tensor, whole: bool) -> list[slice]:
    """All rows of x [M, …] at once, or in blocks."""
    rows = x.shape[0]
    block = ROW_BLOCK if x.device.type == "cpu" else ROW_BLOCK * DEVICE_ROW_BLOCKS
    step = max(rows, 1) if whole else block
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class NativeAdapter:
    """One call's adapter, its factors in the `dtype` its products run in.

    scaling: alpha / rank, and 1 / (1 - p) of what dropout keeps.
    """

    tensors: LinearTensors
    spec: LinearSpec
    a: Tensor
    b: Tensor
    dtype: torch.dtype
    scaling: float

    @classmethod
    def of(
        cls, tensors: LinearTensors, spec: LinearSpec, gemm_dtype: torch.dtype
    ) -> NativeAdapter | None:
        """None without an adapter. Where the base product runs wider, so does the adapter's."""
        a, b = tensors.lora_a, tensors.lora_b
        if a is None or b is None:
            return None
        wider = gemm_dtype.itemsize > spec.lora_dtype.itemsize
        dtype = gemm_dtype if wider else spec.lora_dtype
        return cls(tensors, spec, a.to(dtype), b.to(dtype), dtype, adapter_scaling(tensors, spec))

    def plain(self, x: Tensor) -> bool:
        """Whether its products take x as it is."""
        return x.dtype == self.dtype and self.tensors.seed is None

    def keep(self, rows: slice) -> Tensor | None:
        """The dropout mask of `rows` of x, in `dtype`."""
        if self.tensors.seed is None:
            return None
        spec, bounds = self.spec, (rows.start, rows.stop)
        return keep_mask(
            self.tensors.seed, spec.stream, spec.dropout, bounds, spec.k, dtype=self.dtype
        )

    def low_rank(self, x: Tensor) -> Tensor:
        """scaling * drop(x) aᵀ [M, rank] in `dtype`."""
        low = x.new_empty(x.shape[0], self.a.shape[0], dtype=self.dtype)
        for m in row_blocks(x, whole=self.plain(x)):
            keep = self.keep(m)
            part = x[m].to(self.dtype) if keep is None else keep.mul_(x[m])
            torch.mm(part, self.a.t(), out=low[m])
        return low.mul_(self.scaling)

    def totals(self) -> Totals:
        wide = torch.promote_types(torch.float32, self.dtype)
        return (
            self.a.new_zeros(self.a.shape, dtype=wide),
            self.b.new_zeros(self.b.shape, dtype=wide),
        )

    def accumulate(
        self, totals: Totals, rows: slice, grad: Tensor, grad_low: Tensor, keep: Tensor | None
    ) -> None:
        """Adds what `rows` give to the gradients: `grad` [m, N] and `grad_low` [m, rank] (of
        drop(x) aᵀ, scaling included) in `dtype`."""
        x = self.tensors.x[rows].to(self.dtype)
        if keep is not None:
            x = x * keep
        if self.tensors.low_rank is None:
            low = (x @ self.a.t()).mul_(self.scaling)
        else:
            low = self.tensors.low_rank[rows].to(self.dtype)
        for total, left, right in zip(totals, (grad_low, grad), (x, low), strict=True):
            if total.dtype == left.dtype:
                total.addmm_(left.t(), right)
            else:
                total.add_(left.t() @ right)

    def gradients(self, totals: Totals | None) -> tuple[Tensor | None, Tensor | None]:
        """The totals as gradients of lora_a and lora_b."""
        a, b = self.tensors.lora_a, self.tensors.lora_b
        if totals is None or a is None or b is None:
            return None, None
        return totals[0].to(a.dtype), totals[1].to(b.dtype)

    def add_to_input_gradient(self, total: Tensor, grad_low: Tensor, keep: Tensor | None) -> Tensor:
        """total + keep * grad_low @ a: in place, or in the wider of two dtypes."""
        if keep is None:
            return add_product(total, grad_low, self.a)
        product = grad_low @ self.a
        same = total.dtype == product.dtype
        return torch.addcmul(total, product, keep, out=total if same else None)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right: in place, or in the wider of two dtypes."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return torch.add(total, left @ right)
