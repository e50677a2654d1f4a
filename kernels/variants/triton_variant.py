"""Base of the Triton variants: the demands on a target, and the cost of the adapter's thin
products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_compile.kernels.device_model import LAUNCH_SECONDS, DeviceModel
from qlora_compile.kernels.gpu.target import target_of, why_no_target
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import NO_CONFIG, Config, Variant
from qlora_compile.kernels.variants.decoding import NOT_PACKED, decode_reasons, decoder_rejections


class TritonVariant(Variant):
    """A variant that needs a Triton target.

    Modules that import Triton are imported once a kernel is needed, so that a process without
    Triton can still ask for reasons.
    """

    takes_unquantized = False
    isolated = True

    def rejects(self, problem: Problem) -> list[str]:
        target = target_of(problem.device)
        if target is None:
            return [why_no_target(problem.device)]
        reasons = self.rejects_on(target, problem)
        if not reasons and not self.configs_on(target, problem):
            reasons.append(f"no config for {target}")
            if problem.layout.quantized:
                layout, dtype = problem.layout, problem.compute_dtype
                reasons += decoder_rejections(layout, target, dtype)
        return reasons

    def rejects_on(self, target: str, problem: Problem) -> list[str]:
        """Return why this variant cannot solve `problem` on `target`, whatever its own device."""
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
            reasons.append("adapter and activations are both in float32")
        return reasons

    def configs(self, problem: Problem) -> Sequence[Config]:
        target = target_of(problem.device)
        return () if target is None else self.configs_on(target, problem)

    def configs_on(self, target: str, problem: Problem) -> Sequence[Config]:
        """Return the shipped configs that fit `problem` on `target`."""
        return (NO_CONFIG,)

    def adapter_cost(self, problem: Problem, device: DeviceModel) -> float:
        """Return modelled seconds of the thin products: each reads a tall operand once."""
        if not problem.rank:
            return 0.0
        x, y = 2 * problem.m * problem.k, 2 * problem.m * problem.n
        if problem.direction == "forward":
            return device.stream_seconds(x) + LAUNCH_SECONDS * (3 + problem.dropout)
        recomputed = not problem.keeps_low_rank
        launches = 5 + recomputed + problem.dropout
        return device.stream_seconds((1 + recomputed) * x + 2 * y) + LAUNCH_SECONDS * launches
