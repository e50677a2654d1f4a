"""BlockFormat: formats that store an absmax for each block of the weight."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.errors import PackedWeightError, WeightValueError
from qlora_compile.kernels.formats.base import (
    LARGEST_BLOCK_SIZE,
    SMALLEST_BLOCK_SIZE,
    USUAL_BLOCK_SIZE,
    QuantFormat,
    checked_block_size,
)
from qlora_compile.kernels.formats.cpu import decode
from qlora_compile.kernels.formats.errors import AbsmaxOverflowError
from qlora_compile.kernels.formats.nested import NESTED_BLOCK_SIZE, block_absmax, quantize_absmax
from qlora_compile.kernels.formats.options import DOUBLE, Option
from qlora_compile.kernels.layout import Layout, Plane
from qlora_compile.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.decoders import Side

_LARGEST_BLOCK_COUNT = 2**31
"""Kernels number blocks in 32 bits."""

_QUANTIZE_CHUNK = 1 << 18
"""Elements quantised at a time, so that temporaries stay far below one copy of a layer."""

_CPU_CHUNK = 1 << 19
"""Elements dequantised at a time on CPU: few enough for the temporaries to stay in caches, enough
to hide the cost of starting an operator on all threads."""

_DEVICE_CHUNK = 1 << 22
"""The same on an accelerator, where only the temporaries' memory (12 bytes each) matters."""


class _BlockSizeOption(Option):
    """A power of two from 32 to 4096, or "row" for one absmax a row; `values` are examples."""

    @property
    def allowed(self) -> str:
        return f"a power of two from {SMALLEST_BLOCK_SIZE} to {LARGEST_BLOCK_SIZE}, or 'row'"

    def check(self, format: str, value: object) -> Any:
        """Raise BlockSizeError."""
        return value if value == "row" else checked_block_size(value)


BLOCK_SIZE = _BlockSizeOption("block_size", (32, 64, 128, 256, 512, 4096, "row"), USUAL_BLOCK_SIZE)
DOUBLE_QUANTIZE = Option(DOUBLE, (False, True), False)


class BlockFormat(QuantFormat):
    """Quantises blocks of the row-major flattening of the weight, each by its absmax.

    A Layout's parameters are `block_size` and, where the absmax is quantised too,
    `double_quantize`. The planes, with E = N * K and blocks = ceil(E / block_size):

    - `codes`: of `code_dtype`, as many as E weights of `bits` bits take; of 4-bit formats element
      2i is in the high nibble of byte i (bitsandbytes' layout).
    - `absmax`: float32 [blocks]; doubly quantised: uint8 [blocks], codes into `nested_codebook`.
    - doubly quantised, also `nested_codebook`: float32 [256], `nested_absmax`: float32
      [ceil(blocks / 256)], `nested_offset`: float32 [], and
      absmax[b] = nested_codebook[absmax[b]] * nested_absmax[b // 256] + nested_offset.

    A subclass defines the class variables and the abstract methods, which get runs of whole blocks;
    this class does geometry, checks and double quantisation.
    """

    options: ClassVar[tuple[Option, ...]] = (BLOCK_SIZE,)
    code_dtype: ClassVar[torch.dtype] = torch.uint8
    absmax_divisor: ClassVar[float] = 1.0
    """A code's value is multiplied with absmax / absmax_divisor, itself rounded to float32."""

    def _layout(self, shape: tuple[int, int], **options: Any) -> Layout:
        size = shape[1] if options["block_size"] == "row" else options["block_size"]
        return block_layout(self.name, shape, size, bool(options.get(DOUBLE)))

    def planes(self, layout: Layout) -> tuple[Plane, ...]:
        return _planes(layout, self.bits, self.code_dtype)

    def label(self, layout: Layout) -> str:
        double = " double" if layout.named.get("double_quantize") else ""
        return f"{self.name}/{layout.named['block_size']}{double}"

    def bytes_per_weight(self, layout: Layout) -> float:
        """Return the bytes of codes and absmax, counting absmax as float32, as `prepared` has
        it."""
        return self.bits / 8 + 4 / layout.named["block_size"]

    def _encoded(self, weight: Tensor, layout: Layout, site: str, **options: Any) -> list[Tensor]:
        codes, absmax = self._quantize_flat(weight.reshape(-1), layout.named["block_size"])
        if not bool(absmax.isfinite().all()):
            raise WeightValueError(site=site, count=int((~weight.isfinite()).sum()))
        if not layout.named.get("double_quantize"):
            return [codes, absmax]
        nested = quantize_absmax(absmax)
        if not bool(nested[-1].isfinite()):
            raise AbsmaxOverflowError(site=site, largest=float(absmax.max()))
        return [codes, *nested]

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """Compute each value as float32(code's value) * float32(absmax of its block), rounded to
        float32 and then once to `dtype`."""
        self.check_format(packed)
        rows, columns = packed.shape
        absmax = block_absmax(packed, 0, packed.planes["absmax"].numel())
        scales = self.scales(absmax).repeat_interleave(packed.layout.named["block_size"])
        values = self._code_values(packed.codes.reshape(-1))[: rows * columns]
        return (values * scales[: rows * columns]).to(dtype).view(rows, columns)

    def _stacked(self, layout: Layout, weights: Sequence[PackedWeight]) -> PackedWeight:
        """Decode a doubly quantised absmax, as each weight has an offset of its own."""
        size = layout.named["block_size"]
        for weight in weights[:-1]:
            if weight.shape[0] % self.row_alignment(weight.layout):
                problem = f"its last block of {size} would reach into the weight below"
                raise PackedWeightError(format=self.name, shape=weight.shape, problem=problem)
        absmax = [block_absmax(each, 0, each.planes["absmax"].numel()) for each in weights]
        codes = torch.cat([each.codes.reshape(-1) for each in weights])
        layout = block_layout(self.name, layout.shape, size, False)
        return self.packed(layout, [codes, torch.cat(absmax)])

    def row_alignment(self, layout: Layout) -> int:
        """Return the least r >= 1 such that every r-th row begins at a byte and at an absmax
        block."""
        unit = math.lcm(layout.named["block_size"], 8 // math.gcd(8, self.bits))
        return unit // math.gcd(unit, layout.shape[1])

    def _write_rows(self, packed: PackedWeight, start: int, stop: int, out: Tensor) -> None:
        columns = packed.shape[1]
        self._dequantize_flat(packed, start * columns, stop * columns, out.view(-1))

    def _quantize_flat(self, flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        elements = flat.numel()
        full = elements - elements % block_size
        absmax = torch.empty(-(-elements // block_size), dtype=torch.float32, device=flat.device)
        # An even number of blocks per chunk: each chunk then begins at a byte for any block size.
        chunk = block_size * 2 * max(1, _QUANTIZE_CHUNK // (2 * block_size))
        parts = []
        for start in range(0, full, chunk):
            stop = min(start + chunk, full)
            blocks = flat[start:stop].to(torch.float32).view(-1, block_size)
            block_max = absmax[start // block_size : stop // block_size]
            torch.amax(blocks.abs(), dim=1, out=block_max)
            parts.append(self._encode(blocks, block_max, partial=False))
        if full < elements:
            blocks = flat[full:].to(torch.float32).view(1, -1)
            block_max = absmax[-1:]
            torch.amax(blocks.abs(), dim=1, out=block_max)
            parts.append(self._encode(blocks, block_max, partial=True))
        return torch.cat(parts), absmax

    def _dequantize_flat(self, packed: PackedWeight, first: int, last: int, out: Tensor) -> None:
        """Decode elements `first` … `last` to `out` [last - first]; a byte and a block begin at
        `first`."""
        block_size = packed.layout.named["block_size"]
        if decode.writes(out, block_size):
            whole = (last - first) // block_size * block_size
            blocks = out if whole == last - first else out[:whole]
            if self._write_blocks(packed, first // block_size, blocks):
                if blocks is out:
                    return
                first, out = first + whole, out[whole:]
        first_block = first // block_size
        scales = self.scales(block_absmax(packed, first_block, -(-last // block_size)))
        codes = packed.codes.reshape(-1)
        per_code = 8 // self.bits
        unit = math.lcm(block_size, per_code)
        limit = _CPU_CHUNK if out.device.type == "cpu" else _DEVICE_CHUNK
        chunk = unit * max(1, limit // unit)
        # A float32 result is decoded and scaled where it lies; a narrower one needs the float32
        # product first, because rounding both factors would round twice.
        buffer = None
        if out.dtype != torch.float32:
            size = min(chunk, last - first)
            buffer = torch.empty(size, dtype=torch.float32, device=out.device)
        for begin in range(first, last, chunk):
            end = min(begin + chunk, last)
            target = out[begin - first : end - first]
            values = target if buffer is None else buffer[: end - begin]
            self._write_code_values(codes[begin // per_code : -(-end // per_code)], values)
            block = begin // block_size - first_block
            _scale_blocks(values, scales[block : -(-end // block_size) - first_block], block_size)
            if buffer is not None:
                target.copy_(values)

    @abstractmethod
    def _encode(self, blocks: Tensor, absmax: Tensor, *, partial: bool) -> Tensor:
        """Return codes of float32 `blocks` [b, s] as stored. `partial`: the weight's last block,
        cut short; a format may then adjust its `absmax` [1] in place."""

    @abstractmethod
    def _code_values(self, codes: Tensor) -> Tensor:
        """Return the float32 value of every stored code, in the order of the elements."""

    @abstractmethod
    def _write_code_values(self, codes: Tensor, out: Tensor) -> None:
        """Do as `_code_values`, but fast, and write to `out`, float32 [elements] and contiguous."""

    def _write_blocks(self, packed: PackedWeight, first: int, out: Tensor) -> bool:
        """Write blocks from `first` on to `out` on CPU, float32 or bfloat16, contiguous and of
        whole blocks; return False, having written nothing, if the methods above are as fast."""
        return False

    def device_side(self, layout: Layout, tensors: Sequence[Tensor], tile_columns: int) -> Side:
        from qlora_compile.kernels.formats.gpu.absmax import block_side

        size, tables = layout.named["block_size"], self.device_tables(tensors[0].device)
        return block_side(
            *(tensors[1:], layout.shape[1], size, tile_columns, tables, self.absmax_divisor)
        )

    def prepared(
        self, layout: Layout, tensors: Sequence[Tensor]
    ) -> tuple[Layout, Sequence[Tensor]]:
        """Decode a doubly quantised absmax."""
        if not layout.named.get("double_quantize"):
            return layout, tensors
        from qlora_compile.kernels.formats.gpu.absmax import decoded_absmax

        codes, *nested = tensors
        single = block_layout(self.name, layout.shape, layout.named["block_size"], False)
        return single, [codes, decoded_absmax(*nested)]

    def device_obstacle(self, layout: Layout) -> str | None:
        rows, columns = layout.shape
        blocks = rows * columns // layout.named["block_size"]
        if blocks < _LARGEST_BLOCK_COUNT:
            return None
        return f"{blocks} blocks of absmax, more than {_LARGEST_BLOCK_COUNT - 1}"

    def scales(self, absmax: Tensor) -> Tensor:
        """Return the factors of the codes' values; float32, of the same shape."""
        return absmax if self.absmax_divisor == 1.0 else absmax / self.absmax_divisor


def _scale_blocks(values: Tensor, scales: Tensor, block_size: int) -> None:
    """Multiply each block of `values` in place; the last one may be cut short."""
    full = values.numel() // block_size
    whole = values[: full * block_size].view(full, block_size)
    whole.mul_(scales[:full].unsqueeze(1))
    if full < scales.numel():
        values[full * block_size :].mul_(scales[full])


@functools.lru_cache(maxsize=4096)
def _planes(layout: Layout, bits: int, code_dtype: torch.dtype) -> tuple[Plane, ...]:
    elements = layout.shape[0] * layout.shape[1]
    blocks = math.ceil(elements / layout.named["block_size"])
    double = layout.named.get("double_quantize")
    found = [
        Plane("codes", code_dtype, (math.ceil(elements * bits / 8),)),
        Plane("absmax", torch.uint8 if double else torch.float32, (blocks,)),
    ]
    if double:
        nested_blocks = math.ceil(blocks / NESTED_BLOCK_SIZE)
        found += [
            Plane("nested_codebook", torch.float32, (256,)),
            Plane("nested_absmax", torch.float32, (nested_blocks,)),
            Plane("nested_offset", torch.float32, ()),
        ]
    return tuple(found)


def block_layout(
    format: str, shape: tuple[int, int], block_size: int, double_quantized: bool
) -> Layout:
    """Return the Layout of a weight in blocks of any size, which a checkpoint may have chosen."""
    nested = {"double_quantize": 1} if double_quantized else {}
    return Layout.of(format, shape, block_size=block_size, **nested)
