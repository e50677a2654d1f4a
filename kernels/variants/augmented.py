"""augmented: one vendor GEMM with W and the adapter side by side in one workspace [N, K + rank].

Forward [x | x Aᵀ] [W | s B]ᵀ; backward dY [W | s B] gives the base's dX and dY B s together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.gpu.target import target_of
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import (
    Config,
    Linear,
    LinearGradients,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    SeparateVariant,
    bias_gradient,
)
from qlora_compile.kernels.variants.decoding import dequantize_decoder, dequantize_seconds
from qlora_compile.kernels.variants.triton_variant import TritonVariant


class Augmented(SeparateVariant, TritonVariant):
    name = "augmented"

    def rejects_on(self, target: str, problem: Problem) -> list[str]:
        reasons = super().rejects_on(target, problem)
        if not all(part.rank for part in problem.parts):
            reasons.append("there is no adapter to put beside W")
        if problem.dropout:
            reasons.append("dropout's mask would come between the two products")
        if problem.rank and not (problem.lora_dtype == problem.compute_dtype == problem.x_dtype):
            reasons.append("adapter, base and activations differ in dtype")
        return reasons

    def single_cost(self, problem: Problem, config: Config, device: DeviceModel) -> float:
        m, n, k = problem.m, problem.n, problem.k + problem.rank
        gemm = device.gemm_seconds(m, n, k, device.vendor_efficiency) + LAUNCH_SECONDS
        # Forward copies x; backward leaves dX in rows of K + rank and writes it anew.
        copied = device.stream_seconds(4 * m * problem.k) + LAUNCH_SECONDS
        return (
            gemm + copied + dequantize_seconds(problem, device) + self.adapter_cost(problem, device)
        )

    def _workspace(self, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        from qlora_compile.kernels.gpu.products import dequantize

        dtype = spec.compute_dtype
        decoder = dequantize_decoder(spec.layout, target_of(str(tensors.x.device)), dtype)
        return dequantize(tensors.planes, spec, dtype, decoder, tensors.lora_b, tensors.scaling)

    def single_forward(self, tensors: LinearTensors, spec: LinearSpec, config: Config) -> Tensor:
        from qlora_compile.kernels.gpu.thin_products import added_up, low_rank

        x, a, scaling = tensors.x, tensors.lora_a, tensors.scaling
        assert a is not None
        assert scaling is not None
        wide = x.new_empty(x.shape[0], spec.k + a.shape[0])
        wide[:, : spec.k] = x
        low = added_up(low_rank(x, a, spec.lora_dtype))
        wide[:, spec.k :] = low
        if tensors.low_rank is not None:
            tensors.low_rank.copy_(low.mul_(scaling))
        weight = self._workspace(tensors, spec).t()
        if tensors.bias is None:
            y = wide @ weight
        else:
            y = torch.addmm(tensors.bias.to(wide.dtype), wide, weight)
        return y.to(spec.out_dtype)

    def single_backward(
        self, grad: Tensor, linear: Linear, needs: NeedsGradient, config: Config
    ) -> LinearGradients:
        from qlora_compile.kernels.gpu.thin_products import (
            AdapterGradient,
            adapter_gradients,
            added_up,
            low_rank,
        )

        tensors, spec = linear
        x, a, b, scaling = tensors.x, tensors.lora_a, tensors.lora_b, tensors.scaling
        assert a is not None
        assert b is not None
        assert scaling is not None
        grad = grad.to(spec.compute_dtype)
        grad_x = grad_a = grad_b = None
        if needs.x:
            wide = grad @ self._workspace(tensors, spec)
            grad_low = wide[:, spec.k :]
            grad_x = torch.addmm(wide[:, : spec.k], grad_low, a.to(wide.dtype))
        else:
            grad_low = added_up(low_rank(grad, b.t(), spec.lora_dtype)) * scaling
        if needs.adapter:
            low = tensors.low_rank
            if low is None:
                low = added_up(low_rank(x, a, spec.lora_dtype)) * scaling
            grad_a, grad_b = (
                torch.empty_like(factor, memory_format=torch.contiguous_format) for factor in (a, b)
            )
            gradients = (
                AdapterGradient(x, grad_low.float(), grad_a.t()),
                AdapterGradient(grad, low.float(), grad_b),
            )
            adapter_gradients(gradients, spec.lora_dtype)
        return LinearGradients(grad_x, grad_a, grad_b, bias_gradient(grad, tensors.bias, needs))
