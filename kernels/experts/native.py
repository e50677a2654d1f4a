"""native: torch's own operators, one expert after another, decoded into the workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.kernels.call import NeedsGradient
from qlora_compile.kernels.device_model import LAUNCH_SECONDS, CpuModel, DeviceModel
from qlora_compile.kernels.experts.base import (
    ExpertsProblem,
    ExpertsSpec,
    ExpertsTensors,
    ExpertsVariant,
)
from qlora_compile.kernels.formats.formats import format_of
from qlora_compile.kernels.variants.base import LinearGradients, known_scaling
from qlora_compile.kernels.variants.native_adapter import native_dtypes
from qlora_compile.kernels.workspace import workspace

_OPERATORS = 12
"""How many operators one expert starts, including those of decoding."""

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
        scaling = known_scaling(tensors.scaling)
        end = 0
        for expert, rows in tensors.groups():
            x, end = tensors.x[rows].to(dtype), rows.stop
            weight = _decoded(tensors, spec, expert, dtype)
            part = y[rows] if y.dtype == dtype else x.new_empty(x.shape[0], spec.n)
            if tensors.bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(tensors.bias[expert].to(dtype), x, weight.t(), out=part)
            if tensors.lora_a is not None and tensors.lora_b is not None:
                low, scale = x @ tensors.lora_a[expert].to(dtype).t(), scaling
                if isinstance(scale, Tensor):
                    low, scale = low.mul_(scale), 1.0
                part.addmm_(low, tensors.lora_b[expert].to(dtype).t(), alpha=scale)
            if y.dtype != dtype:
                y[rows] = part
        y[end:] = 0
        return y

    def backward(
        self, grad: Tensor, tensors: ExpertsTensors, spec: ExpertsSpec, needs: NeedsGradient
    ) -> LinearGradients:
        dtype, scaling = _gemm_dtype(tensors.x, spec), known_scaling(tensors.scaling)
        lora_a, lora_b = tensors.lora_a, tensors.lora_b
        # Gradients are contiguous, whatever the strides of their tensors are.
        grad_x = torch.empty(tensors.x.shape, dtype=tensors.x.dtype, device=grad.device)
        grad_a = grad_b = None
        if needs.adapter and lora_a is not None and lora_b is not None:
            grad_a, grad_b = (
                torch.zeros(factor.shape, dtype=factor.dtype, device=factor.device)
                for factor in (lora_a, lora_b)
            )
        end = 0
        for expert, rows in tensors.groups():
            g, end = grad[rows].to(dtype), rows.stop
            a = b = grad_low = None
            if lora_a is not None and lora_b is not None:
                a, b = lora_a[expert].to(dtype), lora_b[expert].to(dtype)
                grad_low = (g @ b).mul_(scaling)
            if needs.x:
                part = g @ _decoded(tensors, spec, expert, dtype)
                if a is not None and grad_low is not None:
                    part.addmm_(grad_low, a)
                grad_x[rows] = part
            if grad_a is not None and grad_b is not None and a is not None and grad_low is not None:
                x = tensors.x[rows].to(dtype)
                grad_a[expert] = grad_low.t() @ x
                grad_b[expert] = (g.t() @ (x @ a.t())).mul_(scaling)
        grad_x[end:] = 0
        return LinearGradients(grad_x if needs.x else None, grad_a, grad_b)


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
