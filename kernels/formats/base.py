"""QuantFormat: how a frozen [N, K] weight is quantised in blocks and read back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from qlora_compile.errors import (
    AbsmaxOverflowError,
    BlockSizeError,
    DoubleQuantizeError,
    PackedWeightError,
    RowRangeError,
    WeightShapeError,
    WeightValueError,
)
from qlora_compile.kernels.cpu import decode
from qlora_compile.kernels.formats.nested import block_absmax, quantize_absmax
from qlora_compile.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.decoders import Decoder

SMALLEST_BLOCK_SIZE = 32
LARGEST_BLOCK_SIZE = 4096

_QUANTIZE_CHUNK = 1 << 18
"""Elements quantised at a time: the temporaries then stay far below one copy of a layer."""


_CPU_CHUNK = 1 << 19
"""Elements dequantised at a time on CPU: few enough that the temporaries stay in its caches, and
enough to hide what starting an operator on all threads costs."""

_DEVICE_CHUNK = 1 << 22
"""The same on an accelerator, where only the temporaries' memory (12 bytes each) matters."""


class QuantFormat(ABC):
    """One storage format of a frozen weight.

    A subclass gives the class variables and the abstract methods, which see runs of whole blocks
    of the row-major flattening of the weight; geometry, checks and double quantisation live here.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    has_double_quantize: ClassVar[bool]
    absmax_divisor: ClassVar[float] = 1.0
    """A code's value is multiplied with absmax / absmax_divisor, itself rounded to float32."""

    def quantize(
        self,
        weight: Tensor,
        *,
        block_size: int | Literal["row"] = 64,
        double_quantize: bool = False,
        site: str = "weight",
    ) -> PackedWeight:
        """Quantises `weight` in blocks of `block_size` elements of its row-major flattening.

        weight: [N, K] of any floating-point dtype and strides, N, K >= 1. block_size: a power of
        two from 32 to 4096, or "row" for one absmax per row. site: the name errors give.

        Returns a PackedWeight on the weight's device. Raises WeightShapeError, WeightValueError
        (NaN or infinity), BlockSizeError, DoubleQuantizeError (no double quantisation in this
        format) and AbsmaxOverflowError (block maxima whose mean exceeds float32).
        """
        if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
            raise WeightShapeError(site=site, value=f"{weight.dtype} {list(weight.shape)}")
        if double_quantize and not self.has_double_quantize:
            raise DoubleQuantizeError(format=self.name)
        rows, columns = weight.shape
        size = columns if block_size == "row" else check_block_size(block_size)
        with torch.no_grad():
            codes, absmax = self._quantize_flat(weight.detach().reshape(-1), size)
            if not bool(absmax.isfinite().all()):
                count = int((~weight.detach().isfinite()).sum())
                raise WeightValueError(site=site, count=count)
            if not double_quantize:
                return PackedWeight(self.name, (rows, columns), size, codes, absmax)
            nested = quantize_absmax(absmax)
            if not bool(nested[-1].isfinite()):
                raise AbsmaxOverflowError(site=site, largest=float(absmax.max()))
            return PackedWeight(self.name, (rows, columns), size, codes, *nested)

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """The weight as [N, K] of `dtype`: the specification `dequantize_rows` is held to.

        Each value is float32(code's value) * float32(absmax of its block), rounded to float32 and
        then once to `dtype`. Raises PackedWeightError if `packed` is of another format.
        """
        self._check_format(packed)
        rows, columns = packed.shape
        absmax = block_absmax(packed, 0, packed.absmax.numel())
        scales = self._scales(absmax).repeat_interleave(packed.block_size)[: rows * columns]
        values = self._code_values(packed.codes.reshape(-1))[: rows * columns]
        return (values * scales).to(dtype).view(rows, columns)

    def dequantize_rows(
        self,
        packed: PackedWeight,
        start: int,
        stop: int,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Rows `start` … `stop` of the weight: [stop - start, K] of `dtype`, written to `out`.

        Equal bit for bit to `dequantize(packed, dtype)[start:stop]`. `out`: contiguous, of that
        shape and dtype, on the weight's device; made when None. Raises RowRangeError unless
        0 <= start <= stop <= N and start is a multiple of `row_alignment(packed)`, and
        PackedWeightError if `packed` is of another format.
        """
        self._check_format(packed)
        rows, columns = packed.shape
        alignment = self.row_alignment(packed)
        if not 0 <= start <= stop <= rows or start % alignment:
            raise RowRangeError(start=start, stop=stop, rows=rows, alignment=alignment)
        if out is None:
            out = torch.empty(stop - start, columns, dtype=dtype, device=packed.codes.device)
        with torch.no_grad():
            self._dequantize_flat(packed, start * columns, stop * columns, out.view(-1))
        return out

    def decoded(
        self,
        packed: PackedWeight,
        dtype: torch.dtype,
        rows: int,
        memory: Callable[[int], Tensor | None] = lambda rows: None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Pairs (n, W[n] in `dtype`) that go through the weight once, about so many `rows` at a
        time. memory: where so many rows are decoded to, None for memory of their own."""
        total, alignment = packed.shape[0], self.row_alignment(packed)
        step = total if rows >= total else max(rows // alignment, 1) * alignment
        for start in range(0, total, step):
            n = slice(start, min(start + step, total))
            out = memory(n.stop - n.start)
            yield n, self.dequantize_rows(packed, n.start, n.stop, dtype, out)

    def row_alignment(self, packed: PackedWeight) -> int:
        """The least r >= 1 such that every r-th row begins at a byte and at an absmax block."""
        unit = math.lcm(packed.block_size, 8 // math.gcd(8, self.bits))
        return unit // math.gcd(unit, packed.shape[1])

    def _check_format(self, packed: PackedWeight) -> None:
        if packed.format != self.name:
            problem = f"cannot be read as {self.name!r}"
            raise PackedWeightError(format=packed.format, shape=packed.shape, problem=problem)

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
        """Elements `first` … `last` to `out` [last - first]; `first` begins a byte and a block."""
        block_size = packed.block_size
        if decode.writes(out, block_size):
            whole = (last - first) // block_size * block_size
            if self._write_blocks(packed, first // block_size, out[:whole]):
                first, out = first + whole, out[whole:]
                if first == last:
                    return
        first_block = first // block_size
        scales = self._scales(block_absmax(packed, first_block, -(-last // block_size)))
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
        """Codes of float32 `blocks` [b, s] as they are stored. `partial`: the weight's last block,
        cut short; a format may then adjust its `absmax` [1] in place."""

    @abstractmethod
    def _code_values(self, codes: Tensor) -> Tensor:
        """float32 value of every stored code, in the order of the elements."""

    @abstractmethod
    def _write_code_values(self, codes: Tensor, out: Tensor) -> None:
        """Like `_code_values`, written to `out`, float32 [elements] and contiguous; fast."""

    def _write_blocks(self, packed: PackedWeight, first: int, out: Tensor) -> bool:
        """Writes blocks `first` … to `out` on CPU, float32 or bfloat16, contiguous and of whole
        blocks; False where nothing is faster than the methods above."""
        return False

    @abstractmethod
    def device_decoders(self) -> tuple[Decoder, ...]:
        """How a Triton kernel may decode it, the one that runs everywhere first. Imports Triton."""

    def device_tables(self, device: torch.device) -> Tensor | None:
        """What the decoders read besides the packed weight: float32, shared, on `device`."""
        return None

    def _scales(self, absmax: Tensor) -> Tensor:
        """What a code's value is multiplied with; float32, same shape."""
        return absmax if self.absmax_divisor == 1.0 else absmax / self.absmax_divisor


def _scale_blocks(values: Tensor, scales: Tensor, block_size: int) -> None:
    """Multiplies each block of `values` in place; the last one may be cut short."""
    full = values.numel() // block_size
    whole = values[: full * block_size].view(full, block_size)
    whole.mul_(scales[:full].unsqueeze(1))
    if full < scales.numel():
        values[full * block_size :].mul_(scales[full])


def check_block_size(block_size: object) -> int:
    problem = None
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        problem = "is not an integer"
    elif block_size < SMALLEST_BLOCK_SIZE or block_size > LARGEST_BLOCK_SIZE:
        problem = "is out of range"
    elif block_size & (block_size - 1):
        problem = "is not a power of two"
    if problem is None:
        assert isinstance(block_size, int)
        return block_size
    raise BlockSizeError(
        value=block_size,
        problem=problem,
        smallest=SMALLEST_BLOCK_SIZE,
        largest=LARGEST_BLOCK_SIZE,
        extra=", or 'row' for one absmax per row",
    )
