"""Registry of the adopters of other libraries' quantised layers."""

from __future__ import annotations

from torch import nn

from qlora_compile.hf.bases.base import Base
from qlora_compile.hf.bases.bitsandbytes import BitsAndBytes
from qlora_compile.hf.bases.compressed_floats import CompressedFloats
from qlora_compile.hf.bases.fp8 import Fp8Linear
from qlora_compile.hf.bases.torchao_floats import TorchaoFloats

BASES: tuple[Base, ...] = (BitsAndBytes(), Fp8Linear(), TorchaoFloats(), CompressedFloats())


def base_of(module: nn.Module) -> Base | None:
    """Return the adopter of a quantised layer, None for any other module."""
    return next((base for base in BASES if base.recognises(module)), None)
