"""augmented_native: `augmented` in torch's own operators, where there is no Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_compile.kernels.device_model import CpuModel, DeviceModel
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
from qlora_compile.kernels.variants.cpu_cost import AUGMENTED_BLOCK, augmented_seconds
from qlora_compile.kernels.variants.dense import DenseConfig
from qlora_compile.kernels.variants.native_adapter import (
    NativeAdapter,
    NativeAdapters,
    NativeGradients,
    native_dtypes,
    row_blocks,
)
from qlora_compile.kernels.workspace import workspace


class NativeAugmented(SeparateVariant):
    """y = [x | S] [W | B]ᵀ with S = s drop(x) Aᵀ; backward dY [W | B] gives dX and dS / s."""

    name = "augmented_native"

    def rejects(self, problem: Problem) -> list[str]:
        reasons = []
        if target_of(problem.device) is not None:
            reasons.append("the variant augmented does this with Triton's decoders")
        if not all(part.rank for part in problem.parts):
            reasons.append("there is no adapter to put beside W")
        elif not self.configs(problem):
            reasons.append(f"the adapter's {problem.lora_dtype} is wider than the GEMM's dtype")
        return reasons

    def configs(self, problem: Problem) -> Sequence[DenseConfig]:
        return [
            DenseConfig(dtype)
            for dtype in native_dtypes(problem.compute_dtype)
            if torch.promote_types(problem.lora_dtype, dtype) == dtype
        ]

    def single_cost(self, problem: Problem, config: Config, device: DeviceModel) -> float:
        assert isinstance(config, DenseConfig)
        assert isinstance(device, CpuModel)  # present, unless the variant rejects the problem
        return augmented_seconds(problem, device, config.gemm_dtype)

    def _weight(self, adapter: NativeAdapter, dtype: torch.dtype) -> Tensor:
        """Return [W | B] as [N, K + rank]."""
        tensors, spec = adapter.tensors, adapter.spec
        k, device = spec.k, tensors.planes[0].device
        wide = workspace(spec.n, k + adapter.b.shape[1], dtype=dtype, device=device)
        wide[:, k:] = adapter.b
        for n, block in spec.decoded(tensors.planes, dtype, AUGMENTED_BLOCK // k):
            wide[n, :k] = block
        return wide

    def single_forward(self, tensors: LinearTensors, spec: LinearSpec, config: Config) -> Tensor:
        assert isinstance(config, DenseConfig)
        x, dtype = tensors.x, config.gemm_dtype
        adapters = NativeAdapters.of([(tensors, spec)], dtype)
        assert adapters is not None
        low_rank = adapters.low_ranks()[0]
        bias = None if tensors.bias is None else tensors.bias.to(dtype)
        weight = self._weight(adapters.members[0], dtype).t()
        y = x.new_empty(x.shape[0], spec.n, dtype=spec.out_dtype)
        for m in row_blocks(x, whole=False):
            wide = torch.cat((x[m].to(dtype), low_rank[m]), dim=1)
            out = y[m] if y.dtype == dtype else None
            if bias is None:
                part = torch.mm(wide, weight, out=out)
            else:
                part = torch.addmm(bias, wide, weight, out=out)
            if out is None:
                y[m] = part
        return y

    def single_backward(
        self, grad: Tensor, linear: Linear, needs: NeedsGradient, config: Config
    ) -> LinearGradients:
        assert isinstance(config, DenseConfig)
        tensors, dtype = linear[0], config.gemm_dtype
        x = tensors.x
        adapters = NativeAdapters.of([linear], dtype)
        assert adapters is not None
        adapter = adapters.members[0]
        weight = self._weight(adapter, dtype) if needs.x else adapter.b
        first = weight.shape[1] - adapter.b.shape[1]
        grad_x = grad_a = grad_b = None
        if needs.x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        if needs.x or needs.adapter:
            work = NativeGradients(adapters, needs)
            for m in row_blocks(x, whole=False):
                part = grad[m].to(dtype)
                wide = part @ weight
                work.take(0, m, part, wide[:, first:])
                if grad_x is not None:
                    grad_x[m] = wide[:, :first]
            work.finish(grad_x)
            grad_a, grad_b = work.of(0)
        return LinearGradients(grad_x, grad_a, grad_b, bias_gradient(grad, tensors.bias, needs))
