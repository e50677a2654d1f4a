"""What an implementation of the experts' grouped linear is, and the key it is chosen by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.device_model import DeviceModel
from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.problem import Direction


@dataclass(frozen=True)
class ExpertsProblem:
    """One direction of y[s] = x[s] @ W[e]ᵀ + bias[e] + scaling * x[s] A[e]ᵀ B[e]ᵀ for every row s
    of expert e.

    `m`: rows of all experts together, bucketed; the rest is exact. `layout`: of all W as one
    [E * N, K]. `rank`: of each expert. The dtypes as in `Problem`; the adapter runs in
    `compute_dtype`.
    """

    direction: Direction
    m: int
    experts: int
    layout: Layout
    rank: int
    x_dtype: torch.dtype
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    bias: bool
    device: str

    @property
    def n(self) -> int:
        """Rows of each expert's W."""
        return self.layout.shape[0] // self.experts

    @property
    def k(self) -> int:
        """Columns of each expert's W."""
        return self.layout.shape[1]


@dataclass(frozen=True)
class ExpertsSpec:
    """The constants of one call; layout: of all W as one [E * N, K]."""

    layout: Layout
    experts: int
    compute_dtype: torch.dtype
    out_dtype: torch.dtype

    @property
    def n(self) -> int:
        """Rows of each expert's W."""
        return self.layout.shape[0] // self.experts

    @property
    def k(self) -> int:
        """Columns of each expert's W."""
        return self.layout.shape[1]


@dataclass(frozen=True)
class ExpertsTensors:
    """x [S, K], its rows sorted by expert; offsets int32 [E], the end of each expert's rows.

    planes: of one PackedWeight of shape [E * N, K], expert e in the rows from e * N, or one plain
    weight [E, N, K] of any strides. bias [E, N]; lora_a [E, R, K] and lora_b [E, N, R], of any
    strides; scaling, one float32 element, where lora_a and lora_b are.
    """

    x: Tensor
    offsets: Tensor
    planes: Sequence[Tensor]
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: Tensor | None

    @property
    def scale(self) -> float | Tensor:
        """Scaling as a number on a CPU; elsewhere the tensor, as reading it would wait for the
        device."""
        assert self.scaling is not None
        return self.scaling.item() if self.scaling.device.type == "cpu" else self.scaling

    @property
    def experts(self) -> int:
        return self.offsets.shape[0]

    def packed(self, spec: ExpertsSpec) -> PackedWeight:
        """The weight of all experts, where it is quantised."""
        return format_named(spec.layout.format).packed(spec.layout, self.planes)

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Pairs (expert, its rows) of the experts that have any; reads `offsets` on the host."""
        start = 0
        for expert, end in enumerate(self.offsets.tolist()):
            if end > start:
                yield expert, slice(start, end)
            start = max(start, end)


@dataclass(frozen=True)
class ExpertsGradients:
    """Of x, lora_a and lora_b, None where not asked for; dtypes are their tensors' own."""

    x: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


class ExpertsVariant(ABC):
    """One implementation. Stateless; the registry's tuple lists them."""

    name: str

    @abstractmethod
    def rejects(self, problem: ExpertsProblem) -> list[str]:
        """Why it cannot solve `problem`; empty when it can."""

    @abstractmethod
    def cost(self, problem: ExpertsProblem, device: DeviceModel) -> float:
        """Modelled seconds, rows spread evenly over the experts."""

    @abstractmethod
    def forward(self, tensors: ExpertsTensors, spec: ExpertsSpec) -> Tensor:
        """y [S, N] in `spec.out_dtype`; zero in the rows past the last offset."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        tensors: ExpertsTensors,
        spec: ExpertsSpec,
        *,
        needs_x: bool,
        needs_adapter: bool,
    ) -> ExpertsGradients:
        """Gradients for `grad` [S, N], zero for experts without rows and rows past the last
        offset; weight and bias are frozen."""
