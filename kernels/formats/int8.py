"""INT8: symmetric 8-bit integers, the row-wise weights of LLM.int8() (Dettmers et al. 2022).

With one absmax per row, codes and absmax are bitsandbytes' CB [N, K] and SCB [N].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from qlora_compile.kernels.formats.blocks import BlockFormat
from qlora_compile.kernels.formats.cpu.decode import write_integers
from qlora_compile.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.decoders import Decoder

_SMALLEST_ABSMAX = 64 * torch.finfo(torch.float32).tiny
"""Keeps 127 / absmax finite."""


class Int8Format(BlockFormat):
    """Codes -127 … 127, value = code * (absmax / 127)."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    code_dtype: ClassVar[torch.dtype] = torch.int8
    absmax_divisor: ClassVar[float] = 127.0

    def _encode(self, blocks: Tensor, absmax: Tensor, *, partial: bool) -> Tensor:
        scales = 127.0 / absmax.clamp(min=_SMALLEST_ABSMAX)
        return (blocks * scales.unsqueeze(1)).round_().to(torch.int8).view(-1)

    def _code_values(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def _write_code_values(self, codes: Tensor, out: Tensor) -> None:
        out.copy_(codes)

    def _write_blocks(self, packed: PackedWeight, first: int, out: Tensor) -> bool:
        size, count = packed.layout.named["block_size"], out.numel()
        absmax = packed.planes["absmax"].reshape(-1)
        scales = self.scales(absmax[first : first + count // size])
        write_integers(packed.codes.reshape(-1)[first * size :], scales, out)
        return True

    def device_decoders(self) -> tuple[Decoder, ...]:
        from qlora_compile.kernels.formats.gpu.decoders import INT8_DECODERS

        return INT8_DECODERS


INT8 = Int8Format()
