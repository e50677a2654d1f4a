"""PackedWeight: a quantised [N, K] weight as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.errors import PackedWeightError
from qlora_compile.kernels.layout import Layout, Plane


def as_bytes(plane: Tensor) -> Tensor:
    """Return `plane`, or if it is floating-point its memory as uint8 [bytes], which neither a
    module's cast nor a policy of mixed precision changes."""
    return plane.reshape(-1).view(torch.uint8) if plane.is_floating_point() else plane


def of_bytes(plane: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `plane`, or the numbers of `dtype` of which `as_bytes` has made it."""
    return plane.view(dtype) if plane.dtype == torch.uint8 and dtype != torch.uint8 else plane


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A frozen weight of logical shape [N, K]: its Layout, and its tensors by the names that the
    layout's format declares. `QuantFormat.packed` makes one from tensors and checks them."""

    layout: Layout
    planes: Mapping[str, Tensor]

    @classmethod
    def checked(
        cls, layout: Layout, declared: Sequence[Plane], tensors: Sequence[Tensor]
    ) -> PackedWeight:
        """Return the PackedWeight of `tensors`, in the order of the `declared` planes, of any shape
        with the right number of elements, or as `as_bytes` makes them. Raises PackedWeightError."""
        problem = None
        if len(tensors) != len(declared):
            names = ", ".join(plane.name for plane in declared)
            problem = f"needs {len(declared)} planes ({names}), got {len(tensors)}"
        tensors = [of_bytes(t, p.dtype) for t, p in zip(tensors, declared, strict=False)]
        for plane, tensor in zip(declared, tensors, strict=False):
            count = math.prod(plane.shape)
            if tensor.dtype != plane.dtype:
                problem = problem or f"{plane.name} must be {plane.dtype}, got {tensor.dtype}"
            if tensor.numel() != count:
                found = tensor.numel()
                problem = problem or f"{plane.name} needs {count} elements, got {found}"
        if problem is not None:
            raise PackedWeightError(format=layout.format, shape=layout.shape, problem=problem)
        names = (plane.name for plane in declared)
        return cls(layout, dict(zip(names, tensors, strict=True)))

    @property
    def format(self) -> str:
        return self.layout.format

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.shape

    @property
    def tensors(self) -> list[Tensor]:
        """The planes in the order in which the format declares them, the codes first."""
        return list(self.planes.values())

    @property
    def codes(self) -> Tensor:
        return next(iter(self.planes.values()))

    @property
    def nbytes(self) -> int:
        return sum(plane.numel() * plane.element_size() for plane in self.planes.values())
