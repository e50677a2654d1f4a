"""INT4 and UINT8: unsigned integers in groups of a row, with or without zero points.

GPTQ (Frantar et al. 2023), AWQ (Lin et al. 2024) and HQQ (Badri and Shaji 2023) store such
integers; here codes are found by rounding to the nearest.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.kernels.formats.cpu import group_codes, group_decode, indexed_decode
from qlora_compile.kernels.formats.errors import FormatOptionValueError, ScaleOverflowError
from qlora_compile.kernels.formats.groups import GroupFormat, padded_groups
from qlora_compile.kernels.formats.half_quadratic import refined_zeros
from qlora_compile.kernels.formats.options import Option
from qlora_compile.kernels.layout import Layout, Plane
from qlora_compile.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.decoders import Decoder

_DTYPES = {each: getattr(torch, each) for each in ("bfloat16", "float16", "float32")}


class IntegerFormat(GroupFormat):
    """Codes 0 … 2**bits - 1, value = (code - zero) * scale.

    Options:

    - `group_size`: columns that share a scale.
    - `zeros`: "integer" for uint8 zeros, "float" for zeros in the scales' dtype, "none" for
      2**(bits - 1) everywhere, or "minimum" for value = code * scale + minimum, as in GGUF's Q4_1.
    - `scales`: the dtype of scales, float zeros and minima.
    - `grouping`: "consecutive" for groups of neighbouring columns, or "indexed" for a plane that
      gives the group of each column, as GPTQ's act-order needs (its g_idx); packing then groups
      columns by their largest weights.
    - `refine`, not stored: HQQ's search for the zeros, which must be "float".

    The planes after the codes, with groups = ceil(K / group_size): `scales` [N, groups], `zeros`
    [N, groups] unless there are none, or `minima` [N, groups], and `group_index` int32 [K] if
    columns are indexed.
    """

    options: ClassVar[tuple[Option, ...]] = (
        Option("group_size", (32, 64, 128, "row"), 64),
        Option("zeros", ("integer", "float", "none", "minimum"), "integer"),
        Option("scales", tuple(_DTYPES), "bfloat16"),
        Option("grouping", ("consecutive", "indexed"), "consecutive"),
        Option("refine", (False, True), False, stored=False),
    )

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def layout(self, shape: tuple[int, int], **options: Any) -> Layout:
        """Return the Layout; also raise FormatOptionValueError for `refine` without float zeros."""
        layout = super().layout(shape, **options)
        self._check_refine(layout, options.get("refine", False))
        return layout

    def _check_refine(self, layout: Layout, refine: bool) -> None:
        if refine and layout.named["zeros"] != "float":
            raise FormatOptionValueError(
                format=self.name, option="refine", value=True, known="zeros='float' with it"
            )

    def _layout(self, shape: tuple[int, int], **options: Any) -> Layout:
        size = shape[1] if options["group_size"] == "row" else options["group_size"]
        options = options | {"group_size": size}
        # Neighbouring columns need no word in a Layout.
        if options["grouping"] == "consecutive":
            del options["grouping"]
        return Layout.of(self.name, shape, **options)

    def label(self, layout: Layout) -> str:
        named, indexed = layout.named, " indexed" * _is_indexed(layout)
        size, zeros = named["group_size"], named["zeros"]
        return f"{self.name}/{size}{indexed} zeros {zeros} {named['scales']}"

    def adds_minima(self, layout: Layout) -> bool:
        return layout.named["zeros"] == "minimum"

    def group_size(self, layout: Layout) -> int:
        return layout.named["group_size"]

    def _side_planes(self, layout: Layout) -> tuple[Plane, ...]:
        return _side_planes(layout)

    def code_values(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def factors(self, packed: PackedWeight, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        rows = packed.shape[0]
        name = "minima" if self.adds_minima(packed.layout) else "zeros"
        stored = (packed.planes["scales"], packed.planes.get(name))
        scales, zeros = (
            None if each is None else each.reshape(rows, -1)[start:stop].to(torch.float32)
            for each in stored
        )
        assert scales is not None
        return scales, zeros

    def stored_factors(self, packed: PackedWeight) -> group_decode.Factors:
        planes, adds = packed.planes, self.adds_minima(packed.layout)
        zeros = planes.get("minima" if adds else "zeros")
        return group_decode.Factors(planes["scales"], zeros, self.symmetric_zero, adds=adds)

    def by_column(self, packed: PackedWeight, factors: Tensor) -> Tensor:
        index = packed.planes.get("group_index")
        return super().by_column(packed, factors) if index is None else factors[:, index]

    def _write_compiled(self, packed: PackedWeight, start: int, stop: int, out: Tensor) -> None:
        index = packed.planes.get("group_index")
        if index is None:
            super()._write_compiled(packed, start, stop, out)
            return
        indexed_decode.write_rows(
            *(packed.codes, self.stored_factors(packed), self.group_size(packed.layout)),
            *(index, self.bits, start, out),
        )

    def _encoded(self, weight: Tensor, layout: Layout, site: str, **options: Any) -> list[Tensor]:
        refine = options["refine"]
        self._check_refine(layout, refine)
        self._check_finite(weight, site)
        if not _is_indexed(layout):
            encode = partial(self._encoded_rows, layout=layout, site=site, refine=refine)
            return self._by_rows(weight, encode)
        columns, device = weight.shape[1], weight.device
        order = weight.abs().amax(0).argsort(stable=True)
        encode = partial(self._encoded_rows, layout=layout, site=site, refine=refine, order=order)
        index = torch.empty(columns, dtype=torch.int32, device=device)
        index[order] = torch.arange(columns, dtype=torch.int32, device=device) // (
            self.group_size(layout)
        )
        return [*self._by_rows(weight, encode), index]

    def _encoded_rows(
        self,
        weight: Tensor,
        layout: Layout,
        site: str,
        refine: bool,
        order: Tensor | None = None,
    ) -> list[Tensor]:
        """Return codes, scales and zeros of some rows. order: the columns, group by group."""
        columns, zeros = weight.shape[1], layout.named["zeros"]
        weight = weight if order is None else weight[:, order]
        groups = padded_groups(weight, layout.named["group_size"])
        # Zero is among the values, so that it is stored exactly with integer zeros.
        low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
        middle = self.symmetric_zero
        if zeros == "none":
            scales = torch.maximum(high / (self.largest - middle), low / -middle)
        else:
            scales = high / self.largest - low / self.largest
        dtype = _DTYPES[layout.named["scales"]]
        scales, minima = scales.to(dtype), low.to(dtype)
        if not bool((scales.isfinite() & (minima.isfinite() | (zeros != "minimum"))).all()):
            largest = float((high - low).max()) / self.largest
            raise ScaleOverflowError(site=site, largest=largest, dtype=dtype)
        divisors = torch.where(scales > 0, scales, torch.inf).to(torch.float32)
        stored: list[Tensor] = []
        offsets = torch.full_like(divisors, middle)
        if zeros == "minimum":
            stored, offsets = [minima], -minima.to(torch.float32) / divisors
        elif zeros != "none":
            offsets = -low / divisors
            if refine:
                counted = padded_groups(torch.ones_like(weight[:1]), groups.shape[2])[0]
                in_steps = groups / divisors.unsqueeze(2)
                offsets = refined_zeros(in_steps, counted, offsets, self.largest)
            offsets = offsets.round_() if zeros == "integer" else offsets
            offsets.clamp_(max=self.largest)
            stored = [offsets.to(torch.uint8 if zeros == "integer" else dtype)]
            offsets = stored[0].to(torch.float32)
        codes = (groups / divisors.unsqueeze(2)).add_(offsets.unsqueeze(2)).round_()
        codes = codes.clamp_(0, self.largest).flatten(1)[:, :columns].to(torch.uint8)
        codes = codes if order is None else codes[:, order.argsort()]
        return [self.stored_codes(codes), scales, *stored]

    def device_decoders(self) -> tuple[Decoder, ...]:
        from qlora_compile.kernels.formats.gpu.decoders import INTEGER_DECODERS

        return INTEGER_DECODERS[self.bits]


class Int4Format(IntegerFormat):
    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    cpu_kind: ClassVar[str] = group_codes.NIBBLES
    symmetric_zero: ClassVar[float] = 8.0


class Uint8Format(IntegerFormat):
    name: ClassVar[str] = "uint8"
    bits: ClassVar[int] = 8
    cpu_kind: ClassVar[str] = group_codes.INTEGER
    symmetric_zero: ClassVar[float] = 128.0


@functools.lru_cache(maxsize=4096)
def _side_planes(layout: Layout) -> tuple[Plane, ...]:
    rows, columns = layout.shape
    shape = (rows, math.ceil(columns / layout.named["group_size"]))
    dtype, zeros = _DTYPES[layout.named["scales"]], layout.named["zeros"]
    scales = Plane("scales", dtype, shape)
    planes = [scales]
    if zeros == "minimum":
        planes.append(Plane("minima", dtype, shape))
    elif zeros != "none":
        planes.append(Plane("zeros", torch.uint8 if zeros == "integer" else dtype, shape))
    if _is_indexed(layout):
        planes.append(Plane("group_index", torch.int32, (columns,)))
    return tuple(planes)


def _is_indexed(layout: Layout) -> bool:
    return layout.named.get("grouping") == "indexed"


INT4, UINT8 = Int4Format(), Uint8Format()
