"""The variants whose product with W is one Triton GEMM that starts at the adapter's product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_compile.kernels.gpu.configs import GemmConfig, adapter_width
from qlora_compile.kernels.gpu.target import tuned_target
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import (
    Config,
    Group,
    LinearGradients,
    LinearSpec,
    LinearTensors,
    NeedsGradient,
    adapter_scaling,
    bias_gradient,
    dropout_factor,
)
from qlora_compile.kernels.variants.decoding import decoder_names
from qlora_compile.kernels.variants.triton_variant import TritonVariant

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.products import AdapterStart


class GemmVariant(TritonVariant):
    """y = x Wᵀ + bias + low Bᵀ with low = s drop(x) Aᵀ, and the gradients, all in Triton; a
    subclass says how W enters the product."""

    @abstractmethod
    def shipped(self, target: str) -> Sequence[GemmConfig]:
        """Configs for `tuned_target(target)`."""

    @abstractmethod
    def weight(self, tensors: LinearTensors, spec: LinearSpec) -> Sequence[Tensor]:
        """What the GEMM takes for W: its planes, or W alone where the configs have no decoder."""

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
        from qlora_compile.kernels.gpu.gemm_launch import gemm

        siblings = [_Sibling.of(*linear) for linear in group]
        _compute_low_ranks(siblings)
        results = []
        for sibling in siblings:
            tensors, spec, saved = sibling.tensors, sibling.spec, sibling.tensors.low_rank
            adapter = None
            if sibling.low is not None and tensors.lora_b is not None:
                adapter, total = sibling.start(sibling.low, tensors.lora_b, saved is not None)
                if saved is not None and total is not None:
                    saved.copy_(total)
            y = tensors.x.new_empty(tensors.x.shape[0], spec.n, dtype=spec.out_dtype)
            weight = self.weight(tensors, spec)
            gemm(tensors.x, weight, spec, config, y, bias=tensors.bias, adapter=adapter)
            results.append(y)
        return results

    def backward_group(
        self, grads: Sequence[Tensor], group: Group, needs: NeedsGradient, config: Config
    ) -> tuple[Tensor | None, list[LinearGradients]]:
        assert isinstance(config, GemmConfig)
        from qlora_compile.kernels.gpu.gemm_launch import gemm
        from qlora_compile.kernels.gpu.products import added_up, low_rank

        x = group[0][0].x
        grad_x = None
        if needs.x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        siblings = [_Sibling.of(*linear, grad) for grad, linear in zip(grads, group, strict=True)]
        for i, (grad, sibling) in enumerate(zip(grads, siblings, strict=True)):
            tensors, spec = sibling.tensors, sibling.spec
            a, b = tensors.lora_a, tensors.lora_b
            adapter = None
            if a is not None and b is not None and (needs.x or needs.adapter):
                planes = low_rank(grad, b.t(), spec.lora_dtype)
                if needs.x:
                    adapter, sibling.grad_low = sibling.start(
                        planes, a.t(), needs.adapter, sibling.bits
                    )
                else:
                    sibling.grad_low = added_up(planes) * adapter_scaling(tensors, spec)
            if grad_x is not None:
                gemm(
                    *(grad, self.weight(tensors, spec), spec, config, grad_x),
                    backward=True,
                    adapter=adapter,
                    accumulate=i > 0,
                )
        if needs.adapter:
            _compute_adapter_gradients(siblings)
        return grad_x, [
            LinearGradients(
                None, each.grad_a, each.grad_b, bias_gradient(grad, each.tensors.bias, needs)
            )
            for grad, each in zip(grads, siblings, strict=True)
        ]


@dataclass
class _Sibling:
    """One Linear of a group and what is computed for it: float32, unless said otherwise.

    grad: of its y [M, N], in a backward. bits: the packed dropout mask of its adapter's input. low:
    drop(x) Aᵀ in planes, as `products.low_rank` makes them. grad_low: the gradient of the sum of
    these planes. grad_a, grad_b: in the dtypes of A and B.
    """

    tensors: LinearTensors
    spec: LinearSpec
    grad: Tensor | None
    bits: Tensor | None
    low: Tensor | None = None
    grad_low: Tensor | None = None
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None

    @classmethod
    def of(cls, tensors: LinearTensors, spec: LinearSpec, grad: Tensor | None = None) -> _Sibling:
        """Of a Linear, with its dropout mask drawn."""
        from qlora_compile.kernels.gpu.products import keep_bits

        rows, seed = tensors.x.shape[0], tensors.seed
        return cls(tensors, spec, grad, None if seed is None else keep_bits(seed, spec, rows))

    def start(
        self, low: Tensor, up: Tensor, total: bool, bits: Tensor | None = None
    ) -> tuple[AdapterStart, Tensor | None]:
        """`adapter_operands` of low and up with this adapter's scaling."""
        from qlora_compile.kernels.gpu.products import adapter_operands

        return adapter_operands(
            *(low, up, self.spec.lora_dtype, self.spec.compute_dtype),
            scaling=self.tensors.scaling,
            factor=dropout_factor(self.tensors, self.spec),
            total=total,
            bits=bits,
        )

    def scaled_low(self) -> Tensor:
        """S [M, rank]: as the forward saved it, or else from `low`."""
        from qlora_compile.kernels.gpu.products import added_up

        if self.low is None:
            assert self.tensors.low_rank is not None
            return self.tensors.low_rank.float()
        return added_up(self.low) * adapter_scaling(self.tensors, self.spec)


def _compute_low_ranks(siblings: Sequence[_Sibling]) -> None:
    """Fills in `low` of those that have an adapter: x is read once for all of them, unless dropout
    gives each one of its own."""
    from qlora_compile.kernels.gpu.products import low_rank

    adapted = [(each, each.tensors.lora_a) for each in siblings]
    factors = [factor for _, factor in adapted if factor is not None]
    if not factors:
        return
    x, dtype = siblings[0].tensors.x, siblings[0].spec.lora_dtype
    if len(factors) == 1 or any(each.bits is not None for each in siblings):
        for each, factor in adapted:
            each.low = None if factor is None else low_rank(x, factor, dtype, each.bits)
        return
    planes = low_rank(x, torch.cat(factors), dtype)
    parts = iter(planes.split([len(factor) for factor in factors], dim=2))
    for each, factor in adapted:
        each.low = None if factor is None else next(parts)


def _compute_adapter_gradients(siblings: Sequence[_Sibling]) -> None:
    """Fills in `grad_a` and `grad_b` of those that have a `grad_low`."""
    from qlora_compile.kernels.gpu.products import adapter_gradient

    x, dtype = siblings[0].tensors.x, siblings[0].spec.lora_dtype
    adapted = [each for each in siblings if each.grad_low is not None]
    if any(each.tensors.low_rank is None for each in adapted):
        _compute_low_ranks(siblings)
    masked = any(each.bits is not None for each in siblings)
    # One product reads x for all of them, unless each drops out an x of its own.
    for together in [[each] for each in adapted] if masked else [adapted] * bool(adapted):
        parts = [each.grad_low for each in together if each.grad_low is not None]
        low = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        total = x.new_empty(low.shape[1], x.shape[1], dtype=torch.float32)
        adapter_gradient(x, low, dtype, total.t(), together[0].bits)
        for each, part in zip(together, total.split([p.shape[1] for p in parts]), strict=True):
            a, b, grad = each.tensors.lora_a, each.tensors.lora_b, each.grad
            assert a is not None
            assert b is not None
            assert grad is not None
            each.grad_b = torch.empty_like(b, memory_format=torch.contiguous_format)
            adapter_gradient(grad, each.scaled_low(), dtype, each.grad_b)
            each.grad_a = part.to(a.dtype, copy=len(together) > 1)
