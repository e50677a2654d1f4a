"""MXFP4 and NVFP4: 4-bit floats e2m1 in small groups with 8-bit scales.

MXFP4 is that of "OCP Microscaling Formats (MX) Specification" v1.0 (2023): groups of 32 with a
power of two, e8m0. NVFP4 is NVIDIA's (Transformer Engine, 2025): groups of 16 with an e4m3 scale,
and one float32 scale for the tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.kernels.formats.cpu import group_codes, group_decode
from qlora_compile.kernels.formats.fp8 import FP8_E4M3
from qlora_compile.kernels.formats.groups import GroupFormat, padded_groups
from qlora_compile.kernels.formats.options import Option
from qlora_compile.kernels.layout import Layout, Plane
from qlora_compile.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.decoders import Decoder, Side

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST = 6.0
_LARGEST_EXPONENT = 2
_E4M3 = torch.float8_e4m3fn

_UP = (0.75, 1.75, 3.5)
_DOWN = (0.25, 1.25, 2.5, 5.0)
"""Boundaries halfway between two magnitudes: those from which on the upper one, being even, is
nearest, and those up to which the lower one is."""


class E2m1Format(GroupFormat):
    """value = e2m1 code * scale: a sign bit, two exponent bits and one of the mantissa."""

    bits: ClassVar[int] = 4
    cpu_kind: ClassVar[str] = group_codes.NIBBLES
    size: ClassVar[int]

    def _layout(self, shape: tuple[int, int], **options: Any) -> Layout:
        return Layout.of(self.name, shape, **options)

    def group_size(self, layout: Layout) -> int:
        return self.size

    def code_values(self, codes: Tensor) -> Tensor:
        return _values(codes.device)[codes.to(torch.int32)]

    def _codes_of(self, groups: Tensor, scales: Tensor, columns: int) -> Tensor:
        """Return the nearest codes of `groups`, float32 [rows, groups, size], ties to even, as
        stored."""
        divisors = torch.where(scales > 0, scales, torch.inf)
        scaled = (groups / divisors.unsqueeze(2)).flatten(1)[:, :columns]
        size = scaled.abs()
        codes = (scaled < 0).to(torch.uint8) << 3
        for boundary in _DOWN:
            codes += size > boundary
        for boundary in _UP:
            codes += size >= boundary
        return self.stored_codes(codes)


class Mxfp4Format(E2m1Format):
    """The plane after the codes: `scales`, uint8 [N, ceil(K / 32)]; s stands for 2**(s - 127), 255
    for NaN."""

    name: ClassVar[str] = "mxfp4"
    size: ClassVar[int] = 32

    def _side_planes(self, layout: Layout) -> tuple[Plane, ...]:
        return (_scale_plane(layout, self.size),)

    def factors(self, packed: PackedWeight, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return _powers(packed.planes["scales"].reshape(packed.shape[0], -1)[start:stop]), None

    def stored_factors(self, packed: PackedWeight) -> group_decode.Factors:
        return group_decode.Factors(packed.planes["scales"], table=_power_table())

    def _encoded(self, weight: Tensor, layout: Layout, site: str, **options: Any) -> list[Tensor]:
        self._check_finite(weight, site)
        return self._by_rows(weight, self._encoded_rows)

    def _encoded_rows(self, weight: Tensor) -> list[Tensor]:
        groups = padded_groups(weight, self.size)
        # frexp's fraction is in [1/2, 1): the exponent of the largest weight, less one.
        exponents = torch.frexp(groups.abs().amax(2)).exponent - 1 - _LARGEST_EXPONENT
        scales = (exponents + 127).clamp_(0, 254).to(torch.uint8)
        return [self._codes_of(groups, _powers(scales), weight.shape[1]), scales]

    def device_decoders(self) -> tuple[Decoder, ...]:
        from qlora_compile.kernels.formats.gpu.decoders import MXFP4_DECODERS

        return MXFP4_DECODERS


class Nvfp4Format(E2m1Format):
    """The planes after the codes: `scales`, uint8 [N, ceil(K / 16)], bits of e4m3; `global_scale`,
    float32 []. A group's scale is the product of the two, rounded to float32.

    Option `global_scale_per`: "tensor", or "row" for `global_scale` [N], as experts with a global
    scale each need it.
    """

    name: ClassVar[str] = "nvfp4"
    size: ClassVar[int] = 16
    options: ClassVar[tuple[Option, ...]] = (
        Option("global_scale_per", ("tensor", "row"), "tensor"),
    )

    def _side_planes(self, layout: Layout) -> tuple[Plane, ...]:
        shape = (layout.shape[0],) if layout.named["global_scale_per"] == "row" else ()
        return _scale_plane(layout, self.size), Plane("global_scale", torch.float32, shape)

    def factors(self, packed: PackedWeight, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        stored = packed.planes["scales"].reshape(packed.shape[0], -1)[start:stop]
        whole = packed.planes["global_scale"].reshape(-1, 1)
        whole = whole if len(whole) == 1 else whole[start:stop]
        return stored.view(_E4M3).float() * whole, None

    def _stacked(self, layout: Layout, weights: Sequence[PackedWeight]) -> PackedWeight:
        """Turn global scales of tensors into those of rows."""
        if layout.named["global_scale_per"] == "row":
            return super()._stacked(layout, weights)
        by_row = []
        for each in weights:
            codes, scales, whole = each.tensors
            rows = self.layout(each.shape, global_scale_per="row")
            planes = [codes, scales, whole.reshape(1).expand(each.shape[0])]
            by_row.append(self.packed(rows, planes))
        return super()._stacked(self.layout(layout.shape, global_scale_per="row"), by_row)

    def stored_factors(self, packed: PackedWeight) -> group_decode.Factors:
        planes = packed.planes
        table = FP8_E4M3.cpu_values()
        return group_decode.Factors(planes["scales"], table=table, whole=planes["global_scale"])

    def _encoded(self, weight: Tensor, layout: Layout, site: str, **options: Any) -> list[Tensor]:
        self._check_finite(weight, site)
        absmax = torch.cat([part.abs().amax(1).float() for part in weight.split(64)])
        if layout.named["global_scale_per"] == "tensor":
            absmax = absmax.max()
        # So that the largest scale of a group is the largest e4m3.
        whole = absmax / (_LARGEST * torch.finfo(_E4M3).max)
        by_row = whole.expand(weight.shape[0]).unsqueeze(1)
        return [*self._by_rows(weight, self._encoded_rows, by_row), whole]

    def _encoded_rows(self, weight: Tensor, whole: Tensor) -> list[Tensor]:
        groups = padded_groups(weight, self.size)
        divisor = torch.where(whole > 0, whole, torch.inf)
        own = (groups.abs().amax(2) / _LARGEST / divisor).clamp_(max=torch.finfo(_E4M3).max)
        stored = own.to(_E4M3)
        codes = self._codes_of(groups, stored.float() * whole, weight.shape[1])
        return [codes, stored.view(torch.uint8)]

    def device_side(self, layout: Layout, tensors: Sequence[Tensor], tile_columns: int) -> Side:
        from qlora_compile.kernels.formats.gpu.groups import group_side

        _, scales, whole = tensors
        return group_side(
            *(scales, None, layout.shape[1], self.size, tile_columns),
            whole=whole,
            whole_shift=0 if layout.named["global_scale_per"] == "row" else 31,
        )

    def device_decoders(self) -> tuple[Decoder, ...]:
        from qlora_compile.kernels.formats.gpu.decoders import NVFP4_DECODERS

        return NVFP4_DECODERS


def _powers(scales: Tensor) -> Tensor:
    """Return the float32 of e8m0 bytes: a byte is the exponent's bits, except for the subnormal
    2**-127 and NaN."""
    bits = scales.to(torch.int32) << 23
    bits = torch.where(scales == 0, 0x00400000, bits)
    return torch.where(scales == 255, 0x7FC00000, bits).view(torch.float32)


@functools.cache
def _power_table() -> Tensor:
    with torch.inference_mode(False):
        return _powers(torch.arange(256, dtype=torch.uint8, device="cpu"))


@functools.cache
def _values(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        magnitudes = torch.tensor(_MAGNITUDES, dtype=torch.float32, device="cpu")
        return torch.cat([magnitudes, -magnitudes]).to(device)


@functools.lru_cache(maxsize=4096)
def _scale_plane(layout: Layout, size: int) -> Plane:
    rows, columns = layout.shape
    return Plane("scales", torch.uint8, (rows, math.ceil(columns / size)))


MXFP4, NVFP4 = Mxfp4Format(), Nvfp4Format()
