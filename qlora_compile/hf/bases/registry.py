"""Registry of the adopters of other libraries' quantised layers."""

from __future__ import annotations

from torch import nn

from qlora_compile.hf.bases.awq import Awq
from qlora_compile.hf.bases.base import Base
from qlora_compile.hf.bases.bitsandbytes import BitsAndBytes
from qlora_compile.hf.bases.compressed_floats import CompressedFloats
from qlora_compile.hf.bases.compressed_integers import CompressedIntegers
from qlora_compile.hf.bases.fp8 import Fp8Linear
from qlora_compile.hf.bases.gptq import Gptq
from qlora_compile.hf.bases.hqq import Hqq
from qlora_compile.hf.bases.torchao_floats import TorchaoFloats
from qlora_compile.hf.bases.torchao_integers import TorchaoIntegers

BASES: tuple[Base, ...] = (
    BitsAndBytes(),
    Gptq(),
    Awq(),
    Hqq(),
    Fp8Linear(),
    TorchaoIntegers(),
    TorchaoFloats(),
    CompressedIntegers(),
    CompressedFloats(),
)


def base_of(module: nn.Module) -> Base | None:
    """Return the adopter of a quantised layer, None for any other module."""
    return next((base for base in BASES if base.recognises(module)), None)
