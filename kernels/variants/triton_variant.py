"""What the Triton variants share: the adapter's thin products around one GEMM with W."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.formats.formats import UNQUANTIZED, format_named
from qlora_compile.kernels.gpu.configs import GemmConfig, adapter_width
from qlora_compile.kernels.gpu.target import target_of, tuned_target
from qlora_compile.kernels.variants.base import (
    NO_CONFIG,
    Config,
    LinearGradients,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    Variant,
    adapter_scaling,
    bias_gradient,
)
from qlora_compile.kernels.variants.decoding import NOT_PACKED, decode_reasons
from qlora_compile.problem import Problem

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.products import AdapterStart


class TritonVariant(Variant):
    """What needs a Triton target. Modules that import Triton are imported once a kernel is needed,
    so that those without it can still ask."""

    takes_unquantized = False
    isolated = True

    def rejects(self, problem: Problem) -> list[str]:
        target = target_of(problem.device)
        if target is None:
            missing = importlib.util.find_spec("triton") is None
            return ["Triton is not installed" if missing else f"no Triton on {problem.device}"]
        reasons = self.rejects_on(target, problem)
        if not reasons and not self.configs_on(target, problem):
            reasons.append(f"no config for {target}")
        return reasons

    def rejects_on(self, target: str, problem: Problem) -> list[str]:
        """Why it cannot solve `problem` on `target`, wherever the problem's own device is."""
        reasons = decode_reasons(target, problem)
        if problem.format == UNQUANTIZED and self.takes_unquantized:
            reasons.remove(NOT_PACKED)
        if problem.compute_dtype == torch.float32:
            reasons.append(f"{problem.compute_dtype} products are left to the vendor's GEMM")
        if problem.rank and problem.lora_dtype not in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            reasons.append(f"the adapter's product is in {problem.lora_dtype}")
        if problem.rank and problem.lora_dtype == problem.x_dtype == torch.float32:
            reasons.append("a float32 adapter over float32 activations")
        return reasons

    def configs(self, problem: Problem) -> Sequence[Config]:
        target = target_of(problem.device)
        return () if target is None else self.configs_on(target, problem)

    def configs_on(self, target: str, problem: Problem) -> Sequence[Config]:
        """The shipped configs that fit `problem` on `target`."""
        return (NO_CONFIG,)

    def adapter_cost(self, problem: Problem, device: DeviceModel) -> float:
        """Modelled seconds of the thin products: each reads a tall operand once."""
        if not problem.rank:
            return 0.0
        x, y = 2 * problem.m * problem.k, 2 * problem.m * problem.n
        if problem.direction == "forward":
            return device.stream_seconds(x) + LAUNCH_SECONDS * (3 + problem.dropout)
        recomputed = not problem.keeps_low_rank
        launches = 5 + recomputed + problem.dropout
        return device.stream_seconds((1 + recomputed) * x + 2 * y) + LAUNCH_SECONDS * launches


class GemmVariant(TritonVariant):
    """y = x Wᵀ + bias + low Bᵀ with low = s drop(x) Aᵀ, and the gradients, all in Triton; a
    subclass says how W enters the product."""

    @abstractmethod
    def shipped(self, target: str) -> Sequence[GemmConfig]:
        """Configs for `tuned_target(target)`."""

    @abstractmethod
    def product(
        self,
        x: Tensor,
        tensors: LinearTensors,
        spec: LinearSpec,
        config: GemmConfig,
        out: Tensor,
        *,
        backward: bool,
        bias: Tensor | None,
        adapter: AdapterStart | None,
    ) -> None:
        """out = x Wᵀ + bias + adapter, or backward x W + adapter."""

    def configs_on(self, target: str, problem: Problem) -> Sequence[Config]:
        tuned = tuned_target(target)
        if tuned is None:
            return []
        return [config for config in self.shipped(tuned) if self._fits(config, target, problem)]

    def _fits(self, config: GemmConfig, target: str, problem: Problem) -> bool:
        masked = problem.dropout and problem.direction == "backward"
        width = adapter_width(problem.rank, problem.lora_dtype, problem.compute_dtype)
        if width > config.largest_width or (masked and not config.masks):
            return False
        if config.direction not in (None, problem.direction):
            return False
        if config.decoder is None:
            return True
        return any(
            decoder.name == config.decoder and not decoder.rejects(target, problem.compute_dtype)
            for decoder in format_named(problem.format).device_decoders()
        )

    def forward(self, tensors: LinearTensors, spec: LinearSpec, config: Config) -> Tensor:
        assert isinstance(config, GemmConfig)
        x, rows = tensors.x, tensors.x.shape[0]
        adapter = None
        if tensors.lora_a is not None and tensors.lora_b is not None:
            from qlora_compile.kernels.gpu.products import AdapterStart, adapter_operand, low_rank

            bits = _keep_bits(tensors, spec)
            scaling, dtypes = adapter_scaling(tensors, spec), (spec.lora_dtype, spec.compute_dtype)
            low = low_rank(x, tensors.lora_a, spec.lora_dtype, scaling, bits)
            kept = tensors.low_rank
            operand, total = adapter_operand(low, *dtypes, up=False, total=kept is not None)
            if kept is not None and total is not None:
                kept.copy_(total)
            up, _ = adapter_operand(tensors.lora_b[None], *dtypes, up=True)
            adapter = AdapterStart(operand, up)
        y = x.new_empty(rows, spec.n, dtype=spec.out_dtype)
        self.product(
            x, tensors, spec, config, y, backward=False, bias=tensors.bias, adapter=adapter
        )
        return y

    def backward(
        self,
        grad: Tensor,
        tensors: LinearTensors,
        spec: LinearSpec,
        needs: NeedsGradient,
        config: Config,
    ) -> LinearGradients:
        assert isinstance(config, GemmConfig)
        x, a, b = tensors.x, tensors.lora_a, tensors.lora_b
        adapter = grad_x = grad_a = grad_b = None
        if a is not None and b is not None and (needs.x or needs.adapter):
            from qlora_compile.kernels.gpu.products import (
                AdapterStart,
                adapter_gradients,
                adapter_operand,
                low_rank,
            )

            bits = _keep_bits(tensors, spec)
            scaling, dtype = adapter_scaling(tensors, spec), spec.lora_dtype
            dtypes = (dtype, spec.compute_dtype)
            planes = low_rank(grad, b.t(), dtype, scaling)
            grad_low, total = adapter_operand(planes, *dtypes, up=False, total=needs.adapter)
            if needs.adapter:
                assert total is not None
                grad_a, grad_b = adapter_gradients(
                    x, grad, total, (a, b), dtype, scaling, bits, tensors.low_rank
                )
            if needs.x:
                up, _ = adapter_operand(a.t()[None], *dtypes, up=True)
                adapter = AdapterStart(grad_low, up, bits)
        if needs.x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            self.product(
                grad, tensors, spec, config, grad_x, backward=True, bias=None, adapter=adapter
            )
        grad_bias = None
        if needs.bias and tensors.bias is not None:
            grad_bias = bias_gradient(grad, tensors.bias)
        return LinearGradients(grad_x, grad_a, grad_b, grad_bias)


def _keep_bits(tensors: LinearTensors, spec: LinearSpec) -> Any:
    if tensors.seed is None:
        return None
    from qlora_compile.kernels.gpu.products import keep_bits

    return keep_bits(tensors.seed, spec, tensors.x.shape[0])
