"""FP4, bitsandbytes' 4-bit float: one sign, two exponent and one mantissa bit."""

from __future__ import annotations

from typing import ClassVar

from qlora_compile.kernels.formats.codebook import CodebookFormat

_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


class Fp4Format(CodebookFormat):
    """Magnitudes over 12 in bitsandbytes' order of bit patterns.

    Code 8 is -0.0, as in bitsandbytes' scalar code; its AVX-512 code and its torch code have +0.0.
    """

    name: ClassVar[str] = "fp4"
    codebook: ClassVar[tuple[float, ...]] = tuple(
        sign * magnitude / 12.0 for sign in (1.0, -1.0) for magnitude in _MAGNITUDES
    )


FP4 = Fp4Format()
