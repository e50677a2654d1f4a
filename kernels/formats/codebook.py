"""4-bit codebook formats in bitsandbytes' layout: sixteen values, two codes per byte."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from qlora_compile.kernels.formats.blocks import BLOCK_SIZE, DOUBLE_QUANTIZE, BlockFormat
from qlora_compile.kernels.formats.cpu.decode import write_codebook
from qlora_compile.kernels.formats.cpu.encode import encode, encodes
from qlora_compile.kernels.formats.options import Option
from qlora_compile.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.decoders import Decoder

_SMALLEST_ABSMAX = 1e-38
"""bitsandbytes divides by no less than this, so that a block of zeros does not give NaN."""

_GATHER_ROWS = 64


class CodebookFormat(BlockFormat):
    """Sixteen values in [-1, 1], scaled by the absmax of a block; equal to bitsandbytes' CPU code.

    Element 2i of the flattened weight is in the high nibble of byte i; an odd element count leaves
    the last low nibble at the code of 0.
    """

    bits: ClassVar[int] = 4
    options: ClassVar[tuple[Option, ...]] = (BLOCK_SIZE, DOUBLE_QUANTIZE)
    codebook: ClassVar[tuple[float, ...]]
    """Value of each code 0 … 15; several codes may share one."""

    def codebook_on(self, device: torch.device) -> Tensor:
        """Return `codebook` as a shared float32 [16] tensor on `device`, not to be written to."""
        return _codebook(self.codebook, device)

    def device_decoders(self) -> tuple[Decoder, ...]:
        from qlora_compile.kernels.formats.gpu.decoders import codebook_decoders

        return codebook_decoders(self.codebook)

    def device_tables(self, device: torch.device) -> Tensor | None:
        return self.codebook_on(device)

    def _encode(self, blocks: Tensor, absmax: Tensor, *, partial: bool) -> Tensor:
        # bitsandbytes multiplies whole blocks by the reciprocal but divides the partial one, and
        # keeps the floor in the partial one's absmax; equal bytes need both.
        if partial:
            absmax.clamp_(min=_SMALLEST_ABSMAX)
            scaled = blocks / absmax.unsqueeze(1)
        else:
            reciprocals = 1.0 / absmax.clamp(min=_SMALLEST_ABSMAX)
            if encodes(blocks):
                return encode(blocks, reciprocals, *_decision(self.codebook, blocks.device))
            scaled = blocks * reciprocals.unsqueeze(1)
        scaled = scaled.clamp_(-1.0, 1.0).view(-1)
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        boundaries, order = _decision(self.codebook, blocks.device)
        codes = order[torch.bucketize(scaled, boundaries, out_int32=True)]
        return (codes[::2] << 4) | codes[1::2]

    def _code_values(self, codes: Tensor) -> Tensor:
        nibbles = torch.stack((codes >> 4, codes & 0xF), dim=1).view(-1)
        return self.codebook_on(codes.device)[nibbles.to(torch.int32)]

    def _write_code_values(self, codes: Tensor, out: Tensor) -> None:
        count = codes.numel()
        pairs = _pairs(self.codebook, codes.device)
        aligned = out.numel() == 2 * count and out.storage_offset() % 2 == 0
        target = out.view(torch.int64) if aligned else pairs.new_empty(count)
        # On CPU a gather along the last dimension is the fastest table lookup and runs on all
        # threads, but only over its rows: hence one broadcast copy of the table per row.
        rows = math.gcd(count, _GATHER_ROWS)
        index = codes.to(torch.int64).view(rows, -1)
        torch.gather(pairs.expand(rows, -1), 1, index, out=target.view(rows, -1))
        if not aligned:
            out.copy_(target.view(torch.float32)[: out.numel()])

    def _write_blocks(self, packed: PackedWeight, first: int, out: Tensor) -> bool:
        if packed.layout.named["block_size"] % 2:
            return False
        write_codebook(packed, self.codebook_on(out.device), first, out)
        return True


@functools.cache
def _codebook(codebook: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(codebook, dtype=torch.float32, device=device)


@functools.cache
def _pairs(codebook: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the two float32 values of every byte, as one 8-byte element each: int64 [256]."""
    with torch.inference_mode(False):
        values = torch.tensor(codebook, dtype=torch.float32, device="cpu")
        pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)
        return pairs.view(torch.int64).view(-1).to(device)


@functools.cache
def _decision(codebook: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (boundaries float32 [15], codes uint8 [16] in ascending order of value).

    A value equal to a boundary belongs to the lower code.
    """
    with torch.inference_mode(False):
        values = torch.tensor(codebook, dtype=torch.float32, device="cpu")
        ascending, order = values.sort(stable=True)
        boundaries = (ascending[:-1] + ascending[1:]) / 2
        return boundaries.to(device), order.to(torch.uint8).to(device)
