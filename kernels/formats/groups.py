"""GroupFormat: formats that store a scale, and perhaps a zero, for each group of a row."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from qlora_compile.errors import WeightValueError
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.cpu import group_decode
from qlora_compile.kernels.layout import Layout, Plane
from qlora_compile.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.decoders import Side

_LARGEST_GROUP_COUNT = 2**31
"""Kernels number groups in 32 bits."""

_CHUNK = 1 << 17
"""Elements encoded, or decoded by torch's operators, at a time: the temporaries stay in caches."""


class GroupFormat(QuantFormat):
    """value = (v(code) - zero) * scale in float32, rounded once to the dtype asked for.

    The first plane is `codes`, uint8 [N, ceil(K * bits / 8)]: a row begins with a byte, and the
    first of two 4-bit codes is in the low half of a byte, as GPTQ, MXFP4 and NVFP4 pack them. The
    spare half byte of an odd K is zero. A row begins with a group; its last group may be shorter.

    A subclass defines the other planes, the size of a group, the factors of rows, and v.
    """

    symmetric_zero: ClassVar[float] = 0.0
    """The zero of formats without a plane of zeros."""
    cpu_kind: ClassVar[str]
    """The kind of codes for the decoder for CPUs."""

    def planes(self, layout: Layout) -> tuple[Plane, ...]:
        rows, columns = layout.shape
        codes = Plane("codes", torch.uint8, (rows, math.ceil(columns * self.bits / 8)))
        return (codes, *self._side_planes(layout))

    @abstractmethod
    def _side_planes(self, layout: Layout) -> tuple[Plane, ...]:
        """Return the planes after the codes."""

    @abstractmethod
    def group_size(self, layout: Layout) -> int:
        """Return how many columns share a factor; at least K if all columns of a row do."""

    @abstractmethod
    def factors(self, packed: PackedWeight, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Return scales and zeros of the groups of rows `start` … `stop`: float32 [stop - start,
        groups], contiguous; None for zeros if all are `symmetric_zero`."""

    @abstractmethod
    def stored_factors(self, packed: PackedWeight) -> group_decode.Factors:
        """Return scales and zeros of all groups, as the decoder for CPUs reads them."""

    @abstractmethod
    def code_values(self, codes: Tensor) -> Tensor:
        """Return the float32 v of every code, uint8 of any shape."""

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        self.check_format(packed)
        return self._rows(packed, 0, packed.shape[0], dtype)

    def _rows(self, packed: PackedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Decode rows `start` … `stop` by torch's operators."""
        values = self.code_values(self._codes(packed, start, stop))
        scales, zeros = self.factors(packed, start, stop)
        shifts = self.symmetric_zero if zeros is None else self.by_column(packed, zeros)
        scales = self.by_column(packed, scales)
        adds = self.adds_minima(packed.layout)
        return (values * scales + shifts if adds else (values - shifts) * scales).to(dtype)

    def adds_minima(self, layout: Layout) -> bool:
        """Whether value = v(code) * scale + minimum, and minima take the place of zeros."""
        return False

    def by_column(self, packed: PackedWeight, factors: Tensor) -> Tensor:
        """Return `factors` of groups, [rows, groups], repeated for their columns: [rows, K]."""
        columns = packed.shape[1]
        size = min(self.group_size(packed.layout), columns)
        return factors.repeat_interleave(size, dim=1)[:, :columns]

    def _codes(self, packed: PackedWeight, start: int, stop: int) -> Tensor:
        """Return the codes of rows `start` … `stop`, uint8 [stop - start, K]."""
        rows, columns = packed.shape
        stored = packed.codes.reshape(rows, -1)[start:stop]
        if self.bits == 8:
            return stored
        return torch.stack((stored & 15, stored >> 4), dim=2).flatten(1)[:, :columns]

    def _write_rows(self, packed: PackedWeight, start: int, stop: int, out: Tensor) -> None:
        columns = packed.shape[1]
        if group_decode.writes(out):
            self._write_compiled(packed, start, stop, out)
            return
        step = max(1, _CHUNK // columns)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = self._rows(packed, first, last, out.dtype)

    def _write_compiled(self, packed: PackedWeight, start: int, stop: int, out: Tensor) -> None:
        """Do as `_write_rows`, by compiled code."""
        group_decode.write_rows(
            *(packed.codes, self.cpu_values(), self.stored_factors(packed)),
            *(self.group_size(packed.layout), self.cpu_kind, start, out),
        )

    def cpu_values(self) -> Tensor:
        """Return v of all codes: float32 [2 ** bits] on a CPU, shared, not to be written to."""
        return _code_values(self)

    def row_alignment(self, layout: Layout) -> int:
        return 1

    def _check_finite(self, weight: Tensor, site: str) -> None:
        """Raise WeightValueError if `weight` holds NaN or infinity."""
        invalid = weight.numel() - int(weight.isfinite().sum())
        if invalid:
            raise WeightValueError(site=site, count=invalid)

    def _by_rows(
        self, weight: Tensor, encode: Callable[..., Sequence[Tensor]], *others: Tensor
    ) -> list[Tensor]:
        """Return the joined results of `encode` for some rows in float32 at a time, with the same
        rows of the `others`."""
        step = max(1, _CHUNK // weight.shape[1])
        parts = zip(*(tensor.split(step) for tensor in (weight, *others)), strict=True)
        made = [encode(part.float(), *rest) for part, *rest in parts]
        return [torch.cat(parts) for parts in zip(*made, strict=True)]

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Return `codes`, uint8 [rows, K], in the form of the plane."""
        if self.bits == 8:
            return codes.contiguous()
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        return codes[:, ::2] | codes[:, 1::2] << 4

    def device_obstacle(self, layout: Layout) -> str | None:
        rows, columns = layout.shape
        groups = rows * math.ceil(columns / self.group_size(layout))
        if groups < _LARGEST_GROUP_COUNT:
            return None
        return f"{groups} groups, more than {_LARGEST_GROUP_COUNT - 1}"

    def device_side(self, layout: Layout, tensors: Sequence[Tensor], tile_columns: int) -> Side:
        from qlora_compile.kernels.formats.gpu.groups import group_side

        names = (plane.name for plane in self.planes(layout))
        named = dict(zip(names, tensors, strict=True))
        return group_side(
            *(named["scales"], named.get("zeros", named.get("minima")), layout.shape[1]),
            *(self.group_size(layout), tile_columns),
            constant=self.symmetric_zero,
            index=named.get("group_index"),
            adds="minima" in named,
        )


@functools.cache
def _code_values(quant_format: GroupFormat) -> Tensor:
    with torch.inference_mode(False):
        codes = torch.arange(2**quant_format.bits, dtype=torch.uint8, device="cpu")
        return quant_format.code_values(codes)


def padded_groups(weight: Tensor, size: int) -> Tensor:
    """Return `weight` [rows, K] as [rows, groups, size], the last group filled up with zeros."""
    rows, columns = weight.shape
    size = min(size, columns)
    return torch.nn.functional.pad(weight, (0, -columns % size)).view(rows, -1, size)
