"""PackedWeight: a quantised [N, K] weight as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.errors import PackedWeightError
from qlora_compile.kernels.layout import Layout

NESTED_BLOCK_SIZE = 256
"""Absmax values per second-level block of double quantisation (QLoRA, Dettmers et al. 2023)."""


def block_layout(
    format: str, shape: tuple[int, int], block_size: int, double_quantized: bool
) -> Layout:
    """The Layout of a PackedWeight."""
    nested = {"double_quantize": 1} if double_quantized else {}
    return Layout.of(format, shape, block_size=block_size, **nested)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A frozen weight of logical shape [N, K], quantised in blocks of its row-major flattening.

    Invariants, with E = N * K and blocks = ceil(E / block_size):

    - `codes`: uint8 [ceil(E / 2)] for the 4-bit formats, element 2i in the high nibble of byte i
      (bitsandbytes' layout); int8 [E] for INT8.
    - `absmax`: float32 [blocks]; doubly quantised: uint8 [blocks], codes into `nested_codebook`.
    - `nested_codebook`: float32 [256], `nested_absmax`: float32 [ceil(blocks / 256)],
      `nested_offset`: float32 []; either all three are there or none, and
      absmax[b] = nested_codebook[absmax[b]] * nested_absmax[b // 256] + nested_offset.

    Codes may come in any shape of the right number of elements, contiguous.
    """

    format: str
    shape: tuple[int, int]
    block_size: int
    codes: Tensor
    absmax: Tensor
    nested_codebook: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        elements = self.shape[0] * self.shape[1]
        blocks = math.ceil(elements / self.block_size)
        code_count = elements if self.codes.dtype == torch.int8 else math.ceil(elements / 2)
        nested = (self.nested_codebook, self.nested_absmax, self.nested_offset)
        problem = None
        if self.codes.dtype not in (torch.uint8, torch.int8):
            problem = f"codes must be uint8 or int8, got {self.codes.dtype}"
        elif self.codes.numel() != code_count:
            problem = f"needs {code_count} codes, got {self.codes.numel()}"
        elif self.absmax.numel() != blocks:
            problem = f"needs {blocks} absmax values, got {self.absmax.numel()}"
        elif any(t is None for t in nested) and any(t is not None for t in nested):
            problem = "double quantisation needs nested_codebook, nested_absmax and nested_offset"
        elif self.absmax.dtype != (torch.uint8 if self.double_quantized else torch.float32):
            problem = (
                f"absmax must be float32, or uint8 when doubly quantised, got {self.absmax.dtype}"
            )
        if problem is not None:
            raise PackedWeightError(format=self.format, shape=self.shape, problem=problem)

    @property
    def double_quantized(self) -> bool:
        return self.nested_codebook is not None

    @property
    def layout(self) -> Layout:
        return block_layout(self.format, self.shape, self.block_size, self.double_quantized)

    @property
    def planes(self) -> list[Tensor]:
        """The tensors in the order `from_planes` takes them: two, or five when doubly quantised."""
        if self.nested_codebook is None:
            return [self.codes, self.absmax]
        assert self.nested_absmax is not None
        assert self.nested_offset is not None
        return [
            self.codes,
            self.absmax,
            self.nested_codebook,
            self.nested_absmax,
            self.nested_offset,
        ]

    @classmethod
    def from_planes(
        cls, format: str, shape: tuple[int, int], block_size: int, planes: Sequence[Tensor]
    ) -> PackedWeight:
        return cls(format, shape, block_size, *planes)

    @property
    def nbytes(self) -> int:
        return sum(plane.numel() * plane.element_size() for plane in self.planes)
