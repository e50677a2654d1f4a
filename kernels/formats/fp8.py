"""FP8: the 8-bit floats of "FP8 Formats for Deep Learning" (Micikevicius et al. 2022).

E4M3 is what the ONNX and OCP specifications call e4m3fn: no infinity, one NaN, 448 at most. E5M2 is
a float16 without its last eight bits. One scale serves a row, the tensor, a block of 128 × 128 as
in "DeepSeek-V3 Technical Report" (2024), section 3.3, or 128 columns of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.kernels.formats.cpu import group_codes, group_decode
from qlora_compile.kernels.formats.groups import GroupFormat
from qlora_compile.kernels.formats.options import Option
from qlora_compile.kernels.layout import Layout, Plane
from qlora_compile.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.decoders import Decoder, Side

_BLOCK = 128
_BLOCK_SHIFT = 7
_ROW_SHIFTS = {"row": 0, "group": 0, "tensor": 31, "block": _BLOCK_SHIFT}
"""2 to this power is the number of rows that share scales."""


class Fp8Format(GroupFormat):
    """value = float8 code * scale. Option `scale_per`: "row", "tensor", "block" of 128 × 128, or
    "group" of 1 × 128.

    The plane after the codes is `scales`, float32 [N], [], [ceil(N / 128), ceil(K / 128)] or
    [N, ceil(K / 128)].
    """

    bits: ClassVar[int] = 8
    options: ClassVar[tuple[Option, ...]] = (
        Option("scale_per", ("row", "tensor", "block", "group"), "row"),
    )
    code_dtype: ClassVar[torch.dtype]

    def _layout(self, shape: tuple[int, int], **options: Any) -> Layout:
        return Layout.of(self.name, shape, **options)

    def label(self, layout: Layout) -> str:
        return f"{self.name} per {layout.named['scale_per']}"

    def group_size(self, layout: Layout) -> int:
        return _BLOCK if layout.named["scale_per"] in ("block", "group") else layout.shape[1]

    def _side_planes(self, layout: Layout) -> tuple[Plane, ...]:
        return _side_planes(layout)

    def code_values(self, codes: Tensor) -> Tensor:
        return codes.view(self.code_dtype).to(torch.float32)

    def factors(self, packed: PackedWeight, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        shape = _side_planes(packed.layout)[0].shape
        scales = packed.planes["scales"].reshape(shape)
        if len(shape) == 0:
            return scales.repeat(stop - start, 1), None
        if len(shape) == 1:
            return scales[start:stop].unsqueeze(1), None
        if packed.layout.named["scale_per"] == "group":
            return scales[start:stop], None
        rows = torch.arange(start, stop, device=scales.device) >> _BLOCK_SHIFT
        return scales[rows], None

    def stored_factors(self, packed: PackedWeight) -> group_decode.Factors:
        shift = _ROW_SHIFTS[packed.layout.named["scale_per"]]
        return group_decode.Factors(packed.planes["scales"], row_shift=shift)

    def _stacked(self, layout: Layout, weights: Sequence[PackedWeight]) -> PackedWeight:
        """Turn scales of tensors into scales of rows, and scales of blocks, if a block would reach
        into the weight below, into scales of groups."""
        per = layout.named["scale_per"]
        cut = any(weight.shape[0] % _BLOCK for weight in weights[:-1])
        if per in ("row", "group") or (per == "block" and not cut):
            return super()._stacked(layout, weights)
        layout = self.layout(layout.shape, scale_per="row" if per == "tensor" else "group")
        codes = torch.cat([each.codes.reshape(each.shape) for each in weights])
        scales = torch.cat([self.factors(each, 0, each.shape[0])[0] for each in weights])
        return self.packed(layout, [codes, scales])

    def device_side(self, layout: Layout, tensors: Sequence[Tensor], tile_columns: int) -> Side:
        from qlora_compile.kernels.formats.gpu.groups import group_side

        return group_side(
            *(tensors[1], None, layout.shape[1], self.group_size(layout), tile_columns),
            row_shift=_ROW_SHIFTS[layout.named["scale_per"]],
        )

    def _encoded(self, weight: Tensor, layout: Layout, site: str, **options: Any) -> list[Tensor]:
        self._check_finite(weight, site)
        rows, columns = weight.shape
        per = layout.named["scale_per"]
        parts = weight.split(_BLOCK)
        if per == "tensor":
            absmax = torch.stack([part.float().abs().max() for part in parts]).max()
        elif per == "row":
            absmax = torch.cat([part.float().abs().amax(1) for part in parts])
        else:
            runs = [[run.float().abs().amax(1) for run in p.split(_BLOCK, dim=1)] for p in parts]
            by_group = [torch.stack(part, dim=1) for part in runs]
            if per == "block":
                by_group = [part.amax(0, keepdim=True) for part in by_group]
            absmax = torch.cat(by_group)
        largest = torch.finfo(self.code_dtype).max
        scales = absmax / largest
        codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
        divisors = torch.where(scales > 0, scales, torch.inf)
        for i, part in enumerate(parts):
            n = slice(i * _BLOCK, i * _BLOCK + part.shape[0])
            own = divisors
            if per == "row":
                own = divisors[n].unsqueeze(1)
            elif per == "block":
                own = divisors[i].repeat_interleave(_BLOCK)[:columns]
            elif per == "group":
                own = divisors[n].repeat_interleave(_BLOCK, dim=1)[:, :columns]
            values = (part.float() / own).clamp_(-largest, largest)
            codes[n] = values.to(self.code_dtype).view(torch.uint8)
        return [codes, scales]


class E4m3Format(Fp8Format):
    name: ClassVar[str] = "fp8_e4m3"
    code_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    cpu_kind: ClassVar[str] = group_codes.E4M3

    def device_decoders(self) -> tuple[Decoder, ...]:
        from qlora_compile.kernels.formats.gpu.decoders import E4M3_DECODERS

        return E4M3_DECODERS


class E5m2Format(Fp8Format):
    name: ClassVar[str] = "fp8_e5m2"
    code_dtype: ClassVar[torch.dtype] = torch.float8_e5m2
    cpu_kind: ClassVar[str] = group_codes.E5M2

    def device_decoders(self) -> tuple[Decoder, ...]:
        from qlora_compile.kernels.formats.gpu.decoders import E5M2_DECODERS

        return E5M2_DECODERS


@functools.lru_cache(maxsize=4096)
def _side_planes(layout: Layout) -> tuple[Plane, ...]:
    rows, columns = layout.shape
    groups = -(-columns // _BLOCK)
    blocks = (-(-rows // _BLOCK), groups)
    shapes = {"row": (rows,), "tensor": (), "block": blocks, "group": (rows, groups)}
    shape = shapes[layout.named["scale_per"]]
    return (Plane("scales", torch.float32, shape),)


FP8_E4M3, FP8_E5M2 = E4m3Format(), E5m2Format()
