"""native: torch's own operators, one expert after another, decoded into the workspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.call import NeedsGradient
from qlora_compile.kernels.cpu import thin
from qlora_compile.kernels.device_model import LAUNCH_SECONDS, CpuModel, DeviceModel
from qlora_compile.kernels.experts.base import (
    ExpertsProblem,
    ExpertsSpec,
    ExpertsTensors,
    ExpertsVariant,
)
from qlora_compile.kernels.formats.formats import format_of
from qlora_compile.kernels.variants.base import LinearGradients, known_scaling
from qlora_compile.kernels.variants.native_adapter import contiguous_rows, native_dtypes
from qlora_compile.kernels.workspace import workspace

_OPERATORS = 12
"""How many operators one expert starts, including those of decoding."""

ROW_UNIT = 32
"""The number of rows of a 16-bit product on a CPU is a multiple of this."""

_SYNCHRONIZATION_SECONDS = 50e-6
"""The seconds of a device to bring the offsets to the host."""


class NativeExperts(ExpertsVariant):
    """Runs anywhere; off the CPU the host waits for the offsets."""

    name = "native"

    def rejects(self, problem: ExpertsProblem) -> list[str]:
        return []

    def cost(self, problem: ExpertsProblem, device: DeviceModel) -> float:
        n, k, rank = problem.n, problem.k, problem.rank
        active = max(min(problem.experts, problem.m), 1)
        rows = -(-problem.m // active)
        thin = (1 if problem.direction == "forward" else 2) * 2 * rows * (n + k) * rank
        if isinstance(device, CpuModel):
            dtype = native_dtypes(problem.compute_dtype)[0]
            seconds = 2 * rows * n * k / device.of(device.gemm, dtype)
            seconds += thin / device.of(device.thin, dtype) + _OPERATORS * device.operator
            if problem.layout.quantized:
                seconds += n * k * device.of(device.decode, dtype)
            return active * seconds
        seconds = device.gemm_seconds(rows, n, k, device.vendor_efficiency)
        seconds += device.stream_seconds(2 * rows * (n + k)) + _OPERATORS * LAUNCH_SECONDS
        if problem.layout.quantized:
            # Codes widened, looked up, scaled and rounded one after another.
            seconds += device.stream_seconds(30 * n * k)
        return active * seconds + _SYNCHRONIZATION_SECONDS

    def forward(self, tensors: ExpertsTensors, spec: ExpertsSpec) -> Tensor:
        dtype = _gemm_dtype(tensors.x, spec)
        y = tensors.x.new_empty(tensors.x.shape[0], spec.n, dtype=spec.out_dtype)
        end = 0
        for expert, rows in tensors.groups():
            end = rows.stop
            more = _more_rows(rows, tensors.x, dtype)
            x = tensors.x[more].to(dtype)
            weight = _decoded(tensors, spec, expert, dtype)
            part = y[more] if y.dtype == dtype else x.new_empty(x.shape[0], spec.n)
            if tensors.bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(tensors.bias[expert].to(dtype), x, weight.t(), out=part)
            count = end - rows.start
            adapter = _Adapter.of(tensors, expert, dtype)
            if adapter is not None:
                adapter.add_product(part[:count], adapter.low_rank(x[:count]), adapter.b.t())
            if y.dtype != dtype:
                y[rows] = part[:count]
        y[end:] = 0
        return y

    def backward(
        self, grad: Tensor, tensors: ExpertsTensors, spec: ExpertsSpec, needs: NeedsGradient
    ) -> LinearGradients:
        dtype = _gemm_dtype(tensors.x, spec)
        # Gradients are contiguous, whatever the strides of their tensors are.
        grad_x = torch.empty(tensors.x.shape, dtype=tensors.x.dtype, device=grad.device)
        grad_a = grad_b = None
        if needs.adapter and tensors.lora_a is not None and tensors.lora_b is not None:
            grad_a, grad_b = (
                torch.zeros(factor.shape, dtype=factor.dtype, device=factor.device)
                for factor in (tensors.lora_a, tensors.lora_b)
            )
        end = 0
        for expert, rows in tensors.groups():
            end = rows.stop
            count = end - rows.start
            adapter = _Adapter.of(tensors, expert, dtype)
            more = _more_rows(rows, grad, dtype) if needs.x else rows
            g = grad[more].to(dtype)
            grad_low = None if adapter is None else adapter.product(g[:count], adapter.b.t())
            if needs.x:
                part = grad_x[more] if grad_x.dtype == dtype else g.new_empty(len(g), spec.k)
                torch.mm(g, _decoded(tensors, spec, expert, dtype), out=part)
                if adapter is not None and grad_low is not None:
                    adapter.add_product(part[:count], grad_low, adapter.a)
                if grad_x.dtype != dtype:
                    grad_x[rows] = part[:count]
            if adapter is not None and grad_low is not None and grad_a is not None:
                assert grad_b is not None
                x = tensors.x[rows].to(dtype)
                adapter.put_gradient(grad_low, x, grad_a[expert])
                adapter.put_gradient(adapter.low_rank(x), g[:count], grad_b[expert].t())
        grad_x[end:] = 0
        return LinearGradients(grad_x if needs.x else None, grad_a, grad_b)


@dataclass(frozen=True)
class _Adapter:
    """The adapter of one expert. thin: whether the thin kernels compute its products, from factors
    in float32; torch's operators do so in the dtype of the base product."""

    a: Tensor
    b: Tensor
    scaling: float | Tensor
    thin: bool

    @classmethod
    def of(cls, tensors: ExpertsTensors, expert: int, dtype: torch.dtype) -> _Adapter | None:
        if tensors.lora_a is None or tensors.lora_b is None:
            return None
        a, b, scaling = tensors.lora_a[expert], tensors.lora_b[expert], tensors.scaling
        if thin.available(tensors.x.new_empty(1, 1, dtype=dtype), a.dtype):
            return cls(a, b, float(known_scaling(scaling)), thin=True)
        return cls(a.to(dtype), b.to(dtype), known_scaling(scaling), thin=False)

    def low_rank(self, x: Tensor) -> Tensor:
        """Return scaling * x aᵀ [m, R]."""
        return self.product(x, self.a)

    def product(self, rows: Tensor, factor: Tensor) -> Tensor:
        """Return scaling * rows factorᵀ: rows [m, K], factor [R, K]."""
        if not self.thin:
            return (rows @ factor.t()).mul_(self.scaling)
        low = rows.new_empty(len(rows), len(factor), dtype=torch.float32)
        thin.product(contiguous_rows(rows), factor, low, float(self.scaling))
        return low

    def add_product(self, total: Tensor, low: Tensor, factor: Tensor) -> None:
        """Add low factor to `total` [m, N]: low [m, R], factor [R, N]."""
        if self.thin:
            thin.add_product(total, low, factor)
        else:
            total.addmm_(low, factor)

    def put_gradient(self, low: Tensor, rows: Tensor, out: Tensor) -> None:
        """Write lowᵀ rows to `out` [R, K]: low [m, R], rows [m, K]."""
        if self.thin and out.dtype == torch.float32:
            thin.gradient(low, contiguous_rows(rows), out)
        else:
            out.copy_(low.t().to(rows.dtype) @ rows)


def _more_rows(rows: slice, of: Tensor, dtype: torch.dtype) -> slice:
    """Return the rows of an expert, and on a CPU further ones, up to a multiple of ROW_UNIT. The
    experts to which the further rows belong overwrite the results later.

    oneDNN compiles a 16-bit product anew for every new number of rows, which takes as long as the
    product itself, and experts have other numbers of rows in every step.
    """
    if of.device.type != "cpu" or dtype.itemsize != 2:
        return rows
    count = -(-(rows.stop - rows.start) // ROW_UNIT) * ROW_UNIT
    return slice(rows.start, min(rows.start + count, of.shape[0]))


def _gemm_dtype(x: Tensor, spec: ExpertsSpec) -> torch.dtype:
    return native_dtypes(spec.compute_dtype)[0] if x.device.type == "cpu" else spec.compute_dtype


def _decoded(tensors: ExpertsTensors, spec: ExpertsSpec, expert: int, dtype: torch.dtype) -> Tensor:
    """Return W[expert] [N, K] in `dtype`, valid until the next one is asked for."""
    quant_format = format_of(spec.layout)
    if quant_format is None:
        return tensors.planes[0][expert].to(dtype)
    packed = quant_format.packed(spec.layout, tensors.planes)
    first = expert * spec.n
    # If decoding cannot begin at this expert, begin at the last row before where it can.
    start = first - first % quant_format.row_alignment(spec.layout)
    stop = first + spec.n
    out = workspace(stop - start, spec.k, dtype=dtype, device=tensors.x.device)
    return quant_format.dequantize_rows(packed, start, stop, dtype, out)[first - start :]
