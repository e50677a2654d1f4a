"""The literal tuple of variants to choose from."""

from __future__ import annotations

from qlora_compile.kernels.formats.formats import FORMATS, UNQUANTIZED, format_named
from qlora_compile.kernels.variants.augmented import Augmented
from qlora_compile.kernels.variants.base import Variant
from qlora_compile.kernels.variants.dense import Dense
from qlora_compile.kernels.variants.fused import Fused, Skinny
from qlora_compile.kernels.variants.native_augmented import NativeAugmented
from qlora_compile.kernels.variants.tail import Tail

__all__ = ["FORMATS", "UNQUANTIZED", "VARIANTS", "format_named"]

VARIANTS: tuple[Variant, ...] = (
    Dense(),
    NativeAugmented(),
    Tail(),
    Augmented(),
    Fused(),
    Skinny(),
)
