"""A format that the package does not have: 4-bit integers with a scale and a zero point for every
group of a row. Registered by conftest.py, it goes through everything that the shipped formats do.
"""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_compile.errors import WeightValueError
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.gpu.decode import grouped, join8
from qlora_compile.kernels.formats.options import Option
from qlora_compile.kernels.gpu.decoders import Decoder, Side
from qlora_compile.kernels.gpu.weight import edge
from qlora_compile.kernels.layout import Layout, Plane
from qlora_compile.kernels.packed import PackedWeight

_LARGEST = 15


class ZeroPointFormat(QuantFormat):
    """value = (code - zero) * scale, codes 0 … 15. A row's codes begin with a byte, the first one
    in its low half, and a row begins with a group."""

    name: ClassVar[str] = "zero_point"
    bits: ClassVar[int] = 4
    options: ClassVar[tuple[Option, ...]] = (Option("group_size", (32, 64, 256, "row"), 64),)

    def _layout(self, shape: tuple[int, int], **options: Any) -> Layout:
        size = shape[1] if options["group_size"] == "row" else options["group_size"]
        return Layout.of(self.name, shape, group_size=size)

    def planes(self, layout: Layout) -> tuple[Plane, ...]:
        rows, columns = layout.shape
        groups = math.ceil(columns / layout.named["group_size"])
        return (
            Plane("integers", torch.uint8, (rows, math.ceil(columns / 2))),
            Plane("scales", torch.float32, (rows, groups)),
            Plane("zeros", torch.uint8, (rows, groups)),
        )

    def _encoded(self, weight: Tensor, layout: Layout, site: str, **options: Any) -> list[Tensor]:
        invalid = weight.numel() - int(weight.isfinite().sum())
        if invalid:
            raise WeightValueError(site=site, count=invalid)
        made = [self._encoded_rows(part.float(), layout) for part in weight.split(64)]
        return [torch.cat(parts) for parts in zip(*made, strict=True)]

    def _encoded_rows(self, weight: Tensor, layout: Layout) -> list[Tensor]:
        (rows, columns), size = weight.shape, layout.named["group_size"]
        blocks = torch.nn.functional.pad(weight, (0, -columns % size)).view(rows, -1, size)
        # Zero is among the values, so that it is stored exactly.
        low, high = blocks.amin(2).clamp(max=0) / _LARGEST, blocks.amax(2).clamp(min=0) / _LARGEST
        scales = high - low
        divisor = torch.where(scales > 0, scales, torch.inf)
        zeros = (-low / divisor * _LARGEST).round_().clamp_(0, _LARGEST)
        codes = (blocks / divisor.unsqueeze(2)).round_().add_(zeros.unsqueeze(2))
        codes = codes.clamp_(0, _LARGEST).view(rows, -1)[:, :columns].to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, columns % 2))
        return [codes[:, ::2] | codes[:, 1::2] << 4, scales, zeros.to(torch.uint8)]

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        self.check_format(packed)
        return self._rows(packed, 0, packed.shape[0], dtype)

    def _write_rows(self, packed: PackedWeight, start: int, stop: int, out: Tensor) -> None:
        for first in range(start, stop, 64):
            last = min(first + 64, stop)
            out[first - start : last - start] = self._rows(packed, first, last, out.dtype)

    def _rows(self, packed: PackedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        declared = self.planes(packed.layout)
        integers, scales, zeros = (
            tensor.reshape(plane.shape)[start:stop]
            for plane, tensor in zip(declared, packed.tensors, strict=True)
        )
        codes = torch.stack((integers & 15, integers >> 4), dim=2)
        codes = codes.flatten(1)[:, : packed.shape[1]].float()
        size = packed.layout.named["group_size"]
        scales, zeros = (
            each.repeat_interleave(size, dim=1)[:, : packed.shape[1]] for each in (scales, zeros)
        )
        return ((codes - zeros) * scales).to(dtype)

    def row_alignment(self, layout: Layout) -> int:
        return 1

    def device_decoders(self) -> tuple[Decoder, ...]:
        return (Decoder("plain", 8, prepare_nothing, load_groups, widened_zeros, decode_integers),)

    def device_side(self, layout: Layout, tensors: Sequence[Tensor], tile_columns: int) -> Side:
        columns, size = layout.shape[1], layout.named["group_size"]
        by_row = size >= columns
        run = tile_columns if by_row else math.gcd(size, tile_columns)
        side = GroupSide(tensors[1], tensors[2], math.ceil(columns / size))
        return Side(side, (-1 if by_row else size.bit_length() - 1, run))


class GroupSide(NamedTuple):
    scales: Tensor
    zeros: Tensor
    groups: int


@triton.jit
def prepare_nothing(side, SIDE: tl.constexpr, PROGRAM: tl.constexpr):
    return 0


@triton.jit
def load_groups(
    side, n0, k0, N, K, SIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    SHIFT: tl.constexpr = SIDE[0]
    RUN: tl.constexpr = SIDE[1]
    index = (n0 + edge(n0, N, ROWS, EVEN_N)).to(tl.int64)[:, None] * side.groups
    columns = (k0 + tl.arange(0, COLUMNS // RUN) * RUN)[None, :]
    if not EVEN_K:
        columns = tl.minimum(columns, K - 1)
    # Without a shift, a row is one group.
    index += (columns >> SHIFT) if SHIFT >= 0 else columns * 0
    return tl.load(side.scales + index), tl.load(side.zeros + index)


@triton.jit
def widened_zeros(loaded, side, state, SIDE: tl.constexpr):
    return loaded[0], loaded[1].to(tl.float32)


@triton.jit
def integer_value(words, SHIFT: tl.constexpr, zeros, scales, DTYPE: tl.constexpr):
    return ((((words >> SHIFT) & 15).to(tl.float32) - zeros) * scales).to(DTYPE)


@triton.jit
def decode_integers(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    by_group, factors = grouped(words, scales[0])
    by_group, zeros = grouped(words, scales[1])
    values = join8(
        integer_value(by_group, 0, zeros, factors, DTYPE),
        integer_value(by_group, 4, zeros, factors, DTYPE),
        integer_value(by_group, 8, zeros, factors, DTYPE),
        integer_value(by_group, 12, zeros, factors, DTYPE),
        integer_value(by_group, 16, zeros, factors, DTYPE),
        integer_value(by_group, 20, zeros, factors, DTYPE),
        integer_value(by_group, 24, zeros, factors, DTYPE),
        integer_value(by_group, 28, zeros, factors, DTYPE),
    )
    return tl.reshape(values, (ROWS, COLUMNS))
