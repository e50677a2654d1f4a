"""Variant: one way to compute the fused linear and its gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_compile.kernels.call import NeedsGradient
from qlora_compile.kernels.device_model import DeviceModel
from qlora_compile.kernels.formats.formats import format_of
from qlora_compile.kernels.layout import Layout, OfLayout, slices
from qlora_compile.kernels.problem import Problem

ROW_BLOCK = 512
"""How many rows of x torch's own operators convert or drop out at a time on CPU, so that no [M, K]
or [M, N] copy is made."""


@dataclass(frozen=True)
class LinearSpec(OfLayout):
    """The constants of one fused linear.

    Shapes: x [..., K], weight [N, K], bias [N], lora_a [R, K], lora_b [N, R]. The base product runs
    in `compute_dtype`, the adapter's in `lora_dtype`; the sum is returned in `out_dtype`. `stream`
    numbers the Linears of a graph so that dropout with one seed draws a mask of its own for each.
    """

    layout: Layout
    dropout: float
    stream: int
    compute_dtype: torch.dtype
    lora_dtype: torch.dtype
    out_dtype: torch.dtype

    @classmethod
    def of(cls, problem: Problem, *, dropout: float, stream: int) -> LinearSpec:
        """Return the constants that `problem` fixes, and those given. dropout: the probability,
        used if the Problem has dropout."""
        dtypes = (problem.compute_dtype, problem.lora_dtype, problem.out_dtype)
        return cls(problem.layout, dropout if problem.dropout else 0.0, stream, *dtypes)

    def dequantize(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the whole weight [N, K] in `dtype`."""
        ((_, weight),) = self.decoded(planes, dtype, self.n)
        return weight

    def decoded(
        self,
        planes: Sequence[Tensor],
        dtype: torch.dtype,
        rows: int,
        memory: Callable[[int], Tensor | None] = lambda rows: None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Do as `QuantFormat.decoded`, also for a weight in its own dtype."""
        quant_format = format_of(self.layout)
        if quant_format is None:
            yield from ((n, planes[0][n].to(dtype)) for n in slices(self.n, rows))
            return
        packed = quant_format.packed(self.layout, planes)
        yield from quant_format.decoded(packed, dtype, rows, memory)


@dataclass(frozen=True)
class LinearTensors:
    """The tensors of one call. x: [M, K]. planes: those of the weight; the weight itself if it is
    kept in its own dtype.

    scaling: the factor of the adapter's product, one float32 element, present with lora_a and
    lora_b. low_rank: `scaling / (1 - dropout) * drop(x) lora_aᵀ` [M, R] in the spec's `lora_dtype`.
    A forward that is given this tensor writes it; a backward reads it instead of computing it
    again.
    """

    x: Tensor
    planes: Sequence[Tensor]
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: Tensor | None
    seed: Tensor | None
    low_rank: Tensor | None = None


@dataclass(frozen=True)
class LinearGradients:
    """Gradients of one call, each in its tensor's dtype; None for those not asked for."""

    x: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None


Linear = tuple[LinearTensors, LinearSpec]

Group = Sequence[Linear]
"""Linears that share x, format, dtypes and dropout: one, or the siblings of a Problem."""


@dataclass(frozen=True)
class Config:
    """The settings of a variant. This class itself is for variants without settings."""

    @property
    def label(self) -> str:
        """A short text, unique among a variant's configs."""
        return "-"


NO_CONFIG = Config()


class Variant(ABC):
    """One way to compute the fused linear; stateless, listed in the registry's tuple."""

    name: str

    isolated: bool = False
    """Whether a bug in it could crash the process; if so, it is measured in a separate process."""

    @abstractmethod
    def rejects(self, problem: Problem) -> list[str]:
        """Return why this variant cannot solve `problem`; empty if it can."""

    def configs(self, problem: Problem) -> Sequence[Config]:
        """Return the configs to choose from, at least one, for a problem that is not rejected."""
        return (NO_CONFIG,)

    @abstractmethod
    def cost(self, problem: Problem, config: Config, device: DeviceModel) -> float:
        """Return modelled seconds, not measured ones, for ranking variants and configs."""

    @abstractmethod
    def forward_group(self, group: Group, config: Config) -> list[Tensor]:
        """Return y [M, N] of each Linear in `out_dtype`."""

    @abstractmethod
    def backward_group(
        self, grads: Sequence[Tensor], group: Group, needs: NeedsGradient, config: Config
    ) -> tuple[Tensor | None, list[LinearGradients]]:
        """Return, for `grads` [M, N] of each Linear, the gradient of the shared x and each Linear's
        other gradients. The base weights are frozen and get none."""


class SeparateVariant(Variant):
    """A variant that computes one Linear at a time: siblings share nothing."""

    @abstractmethod
    def single_cost(self, problem: Problem, config: Config, device: DeviceModel) -> float:
        """Return the `cost` of a single Linear's problem."""

    @abstractmethod
    def single_forward(self, tensors: LinearTensors, spec: LinearSpec, config: Config) -> Tensor:
        """Return y of a single Linear."""

    @abstractmethod
    def single_backward(
        self, grad: Tensor, linear: Linear, needs: NeedsGradient, config: Config
    ) -> LinearGradients:
        """Return the gradients of a single Linear, including that of x."""

    def cost(self, problem: Problem, config: Config, device: DeviceModel) -> float:
        return sum(self.single_cost(part, config, device) for part in problem.parts)

    def forward_group(self, group: Group, config: Config) -> list[Tensor]:
        return [self.single_forward(*linear, config) for linear in group]

    def backward_group(
        self, grads: Sequence[Tensor], group: Group, needs: NeedsGradient, config: Config
    ) -> tuple[Tensor | None, list[LinearGradients]]:
        grad_x = None
        others = []
        for grad, linear in zip(grads, group, strict=True):
            result = self.single_backward(grad, linear, needs, config)
            if result.x is not None:
                grad_x = result.x if grad_x is None else grad_x.add_(result.x)
            others.append(replace(result, x=None))
        return grad_x, others


def adapter_scaling(tensors: LinearTensors, spec: LinearSpec) -> float | Tensor:
    """Return scaling times 1 / (1 - p), the factor of elements that dropout keeps, so that [M, r]
    is multiplied and not [M, K]. The result is a number on a CPU, elsewhere a tensor."""
    assert tensors.scaling is not None
    return known_scaling(tensors.scaling) * dropout_factor(tensors, spec)


def known_scaling(scaling: Tensor | None) -> float | Tensor:
    """Return `scaling`, one element, as a number on a CPU; elsewhere as the tensor itself, because
    reading its value would wait for the device. Return 1 without an adapter."""
    if scaling is None:
        return 1.0
    return scaling.item() if scaling.device.type == "cpu" else scaling


def dropout_factor(tensors: LinearTensors, spec: LinearSpec) -> float:
    """Return the factor of the elements that dropout keeps."""
    return 1.0 if tensors.seed is None else 1.0 / (1.0 - spec.dropout)


def bias_gradient(grad: Tensor, bias: Tensor | None, needs: NeedsGradient) -> Tensor | None:
    """Return the sum of `grad` [M, N] over its rows, added in at least float32, in `bias`'s dtype;
    None if there is no bias or its gradient is not needed."""
    if bias is None or not needs.bias:
        return None
    wide = torch.promote_types(torch.float32, grad.dtype)
    # On CPU, torch copies the whole tensor to sum in another dtype.
    copies = grad.device.type == "cpu" and grad.dtype != wide
    total = grad.new_zeros(grad.shape[1], dtype=wide)
    for part in grad.split(ROW_BLOCK if copies else max(grad.shape[0], 1)):
        total += part.sum(0, dtype=wide)
    return total.to(bias.dtype)
