"""ExpertsVariant: one way to compute the experts' grouped linear; ExpertsProblem: its key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from qlora_compile.kernels.call import NeedsGradient
from qlora_compile.kernels.device_model import DeviceModel
from qlora_compile.kernels.layout import OfLayout
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import LinearGradients, LinearSpec, LinearTensors

PACKED_EXPERTS = "_packed"
"""What follows the name of a weight of experts in the name of the module that holds it packed; the
weight is a Parameter without a module of its own."""


class _OfExperts(OfLayout):
    """A value with the `layout` of the weights of `experts`, all as one [E * N, K]."""

    experts: int

    @property
    def n(self) -> int:
        """Rows of each expert's W."""
        return self.layout.shape[0] // self.experts


@dataclass(frozen=True)
class ExpertsProblem(_OfExperts, Problem):
    """One direction of y[s] = x[s] @ W[e]ᵀ + bias[e] + scaling * x[s] A[e]ᵀ B[e]ᵀ for every row s
    of expert e.

    `m`: the rows of all experts together, bucketed. `rank`: each expert's. The adapter runs in
    `compute_dtype`; nothing is dropped out or saved.
    """

    experts: int = field(kw_only=True)


@dataclass(frozen=True)
class ExpertsSpec(_OfExperts, LinearSpec):
    """The constants of one call."""

    experts: int = field(kw_only=True)


@dataclass(frozen=True)
class ExpertsTensors(LinearTensors):
    """x [S, K], its rows sorted by expert; offsets int32 [E], the end of each expert's rows.

    planes: those of one PackedWeight [E * N, K], with expert e in the rows from e * N on, or one
    plain weight [E, N, K] of any strides. bias: [E, N]. lora_a, lora_b: [E, R, K] and [E, N, R], of
    any strides. scaling: one float32 element, present with lora_a and lora_b. There is no seed and
    no low_rank.
    """

    offsets: Tensor = field(kw_only=True)

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Yield pairs (expert, its rows) of the experts that have any; reads `offsets` on the
        host."""
        start = 0
        for expert, end in enumerate(self.offsets.tolist()):
            if end > start:
                yield expert, slice(start, end)
            start = max(start, end)


class ExpertsVariant(ABC):
    """One way to compute the experts' grouped linear; stateless, listed in the registry."""

    name: str

    @abstractmethod
    def rejects(self, problem: ExpertsProblem) -> list[str]:
        """Return why this variant cannot solve `problem`; empty if it can."""

    @abstractmethod
    def cost(self, problem: ExpertsProblem, device: DeviceModel) -> float:
        """Return modelled seconds, with rows spread evenly over the experts."""

    @abstractmethod
    def forward(self, tensors: ExpertsTensors, spec: ExpertsSpec) -> Tensor:
        """Return y [S, N] in `spec.out_dtype`; zero in the rows past the last offset."""

    @abstractmethod
    def backward(
        self, grad: Tensor, tensors: ExpertsTensors, spec: ExpertsSpec, needs: NeedsGradient
    ) -> LinearGradients:
        """Return gradients for `grad` [S, N], zero for experts without rows and rows past the last
        offset; weight and bias are frozen."""
