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
    from qlora_compile.kernels.gpu.adapter_operands import AdapterStart


class GemmVariant(TritonVariant):
    """y = x Wᵀ + bias + low Bᵀ with low = s drop(x) Aᵀ, and the gradients, all in Triton; a
    subclass defines how W enters the product."""

    @abstractmethod
    def shipped(self, target: str) -> Sequence[GemmConfig]:
        """Return configs for `tuned_target(target)`."""

    @abstractmethod
    def weight(self, tensors: LinearTensors, spec: LinearSpec) -> Sequence[Tensor]:
        """Return what the GEMM takes for W: its planes, or W itself if configs have no decoder."""

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

        starts = _forward_starts(group)
        results = []
        for (tensors, spec), start in zip(group, starts, strict=True):
            y = tensors.x.new_empty(tensors.x.shape[0], spec.n, dtype=spec.out_dtype)
            weight = self.weight(tensors, spec)
            gemm(tensors.x, weight, spec, config, y, bias=tensors.bias, adapter=start)
            results.append(y)
        return results

    def backward_group(
        self, grads: Sequence[Tensor], group: Group, needs: NeedsGradient, config: Config
    ) -> tuple[Tensor | None, list[LinearGradients]]:
        assert isinstance(config, GemmConfig)
        from qlora_compile.kernels.gpu.gemm_launch import gemm

        x = group[0][0].x
        adapted = [_Adapted.of(*linear, grad) for linear, grad in zip(group, grads, strict=True)]
        adapters = [each for each in adapted if each is not None]
        if needs.x or needs.adapter:
            _compute_gradients_of_low(adapters, needs)
        grad_x = None
        if needs.x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            for i, (grad, (tensors, spec)) in enumerate(zip(grads, group, strict=True)):
                each = adapted[i]
                gemm(
                    *(grad, self.weight(tensors, spec), spec, config, grad_x),
                    backward=True,
                    adapter=None if each is None else each.start,
                    accumulate=i > 0,
                )
        if needs.adapter:
            _compute_adapter_gradients(adapters)
        return grad_x, [
            LinearGradients(
                None,
                None if each is None else each.grad_a,
                None if each is None else each.grad_b,
                bias_gradient(grad, tensors.bias, needs),
            )
            for grad, (tensors, _), each in zip(grads, group, adapted, strict=True)
        ]


@dataclass
class _Adapted:
    """An adapted Linear of a group and what a backward computes for it.

    grad: of its y [M, N]. bits: the packed dropout mask of its adapter's input. start: where the
    gradient of x starts. grad_low: the gradient of drop(x) Aᵀ, [M, rank] in `lora_dtype`. grad_a,
    grad_b: in the dtypes of A and B.
    """

    tensors: LinearTensors
    spec: LinearSpec
    a: Tensor
    b: Tensor
    grad: Tensor
    bits: Tensor | None
    start: AdapterStart | None = None
    grad_low: Tensor | None = None
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None

    @classmethod
    def of(cls, tensors: LinearTensors, spec: LinearSpec, grad: Tensor) -> _Adapted | None:
        """Return the object for a Linear, with its dropout mask drawn; None without an adapter."""
        if tensors.lora_a is None or tensors.lora_b is None:
            return None
        return cls(tensors, spec, tensors.lora_a, tensors.lora_b, grad, _mask(tensors, spec))


def _mask(tensors: LinearTensors, spec: LinearSpec) -> Tensor | None:
    from qlora_compile.kernels.gpu.products import keep_bits

    return None if tensors.seed is None else keep_bits(tensors.seed, spec, tensors.x.shape[0])


def _forward_starts(group: Group) -> list[AdapterStart | None]:
    """Return the start of each Linear's accumulator, and write S if the forward keeps it. One
    launch of each kind serves all Linears."""
    from qlora_compile.kernels.gpu.adapter_operands import AdapterFactors, adapter_operands
    from qlora_compile.kernels.gpu.thin_products import ThinProduct, low_ranks

    starts: list[AdapterStart | None] = [None] * len(group)
    products, scaled, indices = [], [], []
    for i, (tensors, spec) in enumerate(group):
        if tensors.lora_a is not None and tensors.lora_b is not None:
            products.append(ThinProduct(tensors.x, tensors.lora_a, _mask(tensors, spec)))
            scaled.append(tensors)
            indices.append(i)
    if not products:
        return starts
    tensors, spec = group[indices[0]]
    factors = [
        AdapterFactors(planes, each.lora_b, each.scaling, each.low_rank)
        for planes, each in zip(low_ranks(products, spec.lora_dtype), scaled, strict=True)
    ]
    dtypes = spec.lora_dtype, spec.compute_dtype
    found = adapter_operands(factors, *dtypes, dropout_factor(tensors, spec))
    for i, start in zip(indices, found, strict=True):
        starts[i] = start
    return starts


def _compute_gradients_of_low(adapters: Sequence[_Adapted], needs: NeedsGradient) -> None:
    """Fill in `start` if x needs its gradient, and `grad_low` if the adapters need theirs."""
    from qlora_compile.kernels.gpu.adapter_operands import AdapterFactors, adapter_operands
    from qlora_compile.kernels.gpu.thin_products import ThinProduct, added_up, low_ranks

    if not adapters:
        return
    tensors, spec = adapters[0].tensors, adapters[0].spec
    products = [ThinProduct(each.grad, each.b.t()) for each in adapters]
    found = low_ranks(products, spec.lora_dtype)
    if not needs.x:
        for each, planes in zip(adapters, found, strict=True):
            scaled = added_up(planes) * adapter_scaling(each.tensors, spec)
            each.grad_low = scaled.to(spec.lora_dtype)
        return
    if needs.adapter:
        ranks = [each.a.shape[0] for each in adapters]
        kept = tensors.x.new_empty(tensors.x.shape[0], sum(ranks), dtype=spec.lora_dtype)
        for each, part in zip(adapters, kept.split(ranks, dim=1), strict=True):
            each.grad_low = part
    factors = [
        AdapterFactors(planes, each.a.t(), each.tensors.scaling, each.grad_low, each.bits)
        for planes, each in zip(found, adapters, strict=True)
    ]
    dtypes = spec.lora_dtype, spec.compute_dtype
    starts = adapter_operands(factors, *dtypes, dropout_factor(tensors, spec))
    for each, start in zip(adapters, starts, strict=True):
        each.start = start


def _compute_adapter_gradients(adapters: Sequence[_Adapted]) -> None:
    """Fill in `grad_a` and `grad_b`, from `grad_low`."""
    from qlora_compile.kernels.gpu.thin_products import AdapterGradient, adapter_gradients

    if not adapters:
        return
    gradients = []
    for each, low in zip(adapters, _scaled_lows(adapters), strict=True):
        assert each.grad_low is not None
        each.grad_a, each.grad_b = (
            torch.empty_like(factor, memory_format=torch.contiguous_format)
            for factor in (each.a, each.b)
        )
        of_a = AdapterGradient(each.tensors.x, each.grad_low, each.grad_a.t(), each.bits)
        gradients += [of_a, AdapterGradient(each.grad, low, each.grad_b)]
    adapter_gradients(gradients, adapters[0].spec.lora_dtype)


def _scaled_lows(adapters: Sequence[_Adapted]) -> list[Tensor]:
    """Return S [M, rank] of each, in `lora_dtype`, as the forward kept it, or computed again."""
    from qlora_compile.kernels.gpu.thin_products import ThinProduct, added_up, low_ranks

    kept = [each.tensors.low_rank for each in adapters]
    if None not in kept:
        return [low for low in kept if low is not None]
    spec = adapters[0].spec
    products = [ThinProduct(each.tensors.x, each.a, each.bits) for each in adapters]
    return [
        (added_up(planes) * adapter_scaling(each.tensors, spec)).to(spec.lora_dtype)
        for planes, each in zip(low_ranks(products, spec.lora_dtype), adapters, strict=True)
    ]
