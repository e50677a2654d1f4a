"""What the Triton variants share: the adapter's thin products around one GEMM with W."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.gpu.configs import GemmConfig, adapter_width
from qlora_compile.kernels.gpu.target import target_of, tuned_target, why_no_target
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import (
    NO_CONFIG,
    Config,
    Group,
    LinearGradients,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    Variant,
    adapter_scaling,
    bias_gradient,
    kept_factor,
)
from qlora_compile.kernels.variants.decoding import NOT_PACKED, decode_reasons, decoder_names

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
            return [why_no_target(problem.device)]
        reasons = self.rejects_on(target, problem)
        if not reasons and not self.configs_on(target, problem):
            reasons.append(f"no config for {target}")
        return reasons

    def rejects_on(self, target: str, problem: Problem) -> list[str]:
        """Why it cannot solve `problem` on `target`, wherever the problem's own device is."""
        reasons = decode_reasons(target, problem)
        if not problem.layout.quantized and self.takes_unquantized:
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
        accumulate: bool = False,
    ) -> None:
        """out = x Wᵀ + bias + adapter, or backward x W + adapter; added to out to `accumulate`."""

    def configs_on(self, target: str, problem: Problem) -> Sequence[Config]:
        tuned = tuned_target(target)
        if tuned is None:
            return []
        return [config for config in self.shipped(tuned) if self._fits(config, target, problem)]

    def _fits(self, config: GemmConfig, target: str, problem: Problem) -> bool:
        masked = problem.dropout and problem.direction == "backward"
        rank = max(part.rank for part in problem.parts)
        width = adapter_width(rank, problem.lora_dtype, problem.compute_dtype)
        if width > config.largest_width or (masked and not config.masks):
            return False
        if config.direction not in (None, problem.direction):
            return False
        if config.decoder is None:
            return True
        return config.decoder in decoder_names(problem.layout, target, problem.compute_dtype)

    def forward_group(self, group: Group, config: Config) -> list[Tensor]:
        assert isinstance(config, GemmConfig)
        lows = _low_ranks(group, [_keep_bits(tensors, spec) for tensors, spec in group])
        results = []
        for (tensors, spec), low in zip(group, lows, strict=True):
            adapter = None
            if low is not None and tensors.lora_b is not None:
                from qlora_compile.kernels.gpu.products import adapter_operands

                dtypes = (spec.lora_dtype, spec.compute_dtype)
                saved = tensors.low_rank
                adapter, total = adapter_operands(
                    *(low, tensors.lora_b, *dtypes),
                    scaling=tensors.scaling,
                    kept=kept_factor(tensors, spec),
                    total=saved is not None,
                )
                if saved is not None and total is not None:
                    saved.copy_(total)
            y = tensors.x.new_empty(tensors.x.shape[0], spec.n, dtype=spec.out_dtype)
            self.product(
                *(tensors.x, tensors, spec, config, y),
                backward=False,
                bias=tensors.bias,
                adapter=adapter,
            )
            results.append(y)
        return results

    def backward_group(
        self, grads: Sequence[Tensor], group: Group, needs: NeedsGradient, config: Config
    ) -> tuple[Tensor | None, list[LinearGradients]]:
        assert isinstance(config, GemmConfig)
        x = group[0][0].x
        grad_x = None
        if needs.x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        accumulates = False
        others = []
        bits = [_keep_bits(tensors, spec) for tensors, spec in group]
        grads_low: list[Tensor | None] = [None] * len(group)
        for i, (grad, (tensors, spec)) in enumerate(zip(grads, group, strict=True)):
            a, b = tensors.lora_a, tensors.lora_b
            adapter = None
            if a is not None and b is not None and (needs.x or needs.adapter):
                from qlora_compile.kernels.gpu.products import adapter_operands, added_up, low_rank

                dtypes = (spec.lora_dtype, spec.compute_dtype)
                planes = low_rank(grad, b.t(), spec.lora_dtype)
                if needs.x:
                    adapter, grads_low[i] = adapter_operands(
                        *(planes, a.t(), *dtypes),
                        scaling=tensors.scaling,
                        kept=kept_factor(tensors, spec),
                        total=needs.adapter,
                        bits=bits[i],
                    )
                else:
                    grads_low[i] = added_up(planes) * adapter_scaling(tensors, spec)
            if grad_x is not None:
                self.product(
                    *(grad, tensors, spec, config, grad_x),
                    backward=True,
                    bias=None,
                    adapter=adapter,
                    accumulate=accumulates,
                )
                accumulates = True
            grad_bias = None
            if needs.bias and tensors.bias is not None:
                grad_bias = bias_gradient(grad, tensors.bias)
            others.append(LinearGradients(None, None, None, grad_bias))
        if needs.adapter:
            _fill_in_adapters(others, grads, group, grads_low, bits)
        return grad_x, others


def _low_ranks(group: Group, bits: Sequence[Tensor | None]) -> list[Tensor | None]:
    """S of each Linear with an adapter, not yet scaled, in planes as `products.low_rank` makes
    them: x is read once for all of them, unless dropout gives each one of its own."""
    adapted = [i for i, (tensors, _) in enumerate(group) if tensors.lora_a is not None]
    results: list[Tensor | None] = [None] * len(group)
    if not adapted:
        return results
    from qlora_compile.kernels.gpu.products import low_rank

    factors = {i: group[i][0].lora_a for i in adapted}
    x, dtype = group[0][0].x, group[0][1].lora_dtype
    if len(adapted) == 1 or any(each is not None for each in bits):
        for i, factor in factors.items():
            assert factor is not None
            results[i] = low_rank(x, factor, dtype, bits[i])
        return results
    stacked = torch.cat([factor for factor in factors.values() if factor is not None])
    planes = low_rank(x, stacked, dtype)
    parts = planes.split([len(factor) for factor in factors.values() if factor is not None], dim=2)
    for i, part in zip(adapted, parts, strict=True):
        results[i] = part
    return results


def _fill_in_adapters(
    others: list[LinearGradients],
    grads: Sequence[Tensor],
    group: Group,
    grads_low: Sequence[Tensor | None],
    bits: Sequence[Tensor | None],
) -> None:
    """Puts the gradients of A and B into `others`; grads_low: float32, of drop(x) Aᵀ."""
    from qlora_compile.kernels.gpu.products import adapter_gradient, added_up

    x, dtype = group[0][0].x, group[0][1].lora_dtype
    adapted = [i for i, grad_low in enumerate(grads_low) if grad_low is not None]
    lows = [tensors.low_rank for tensors, _ in group]
    if any(lows[i] is None for i in adapted):
        lows = [
            None if low is None else added_up(low) * adapter_scaling(*linear)
            for low, linear in zip(_low_ranks(group, bits), group, strict=True)
        ]
    masked = any(each is not None for each in bits)
    # One product reads x for all of them, unless each drops out an x of its own.
    for together in [[i] for i in adapted] if masked else [adapted] * bool(adapted):
        parts = [part for i in together if (part := grads_low[i]) is not None]
        low = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        total = x.new_empty(low.shape[1], x.shape[1], dtype=torch.float32)
        adapter_gradient(x, low, dtype, total.t(), bits[together[0]])
        for i, part in zip(together, total.split([p.shape[1] for p in parts]), strict=True):
            tensors, kept = group[i][0], lows[i]
            assert tensors.lora_a is not None
            assert tensors.lora_b is not None
            assert kept is not None
            grad_b = torch.empty_like(tensors.lora_b, memory_format=torch.contiguous_format)
            adapter_gradient(grads[i], kept.float(), dtype, grad_b)
            grad_a = part.to(tensors.lora_a.dtype, copy=len(together) > 1)
            others[i] = replace(others[i], lora_a=grad_a, lora_b=grad_b)


def _keep_bits(tensors: LinearTensors, spec: LinearSpec) -> Any:
    if tensors.seed is None:
        return None
    from qlora_compile.kernels.gpu.products import keep_bits

    return keep_bits(tensors.seed, spec, tensors.x.shape[0])
