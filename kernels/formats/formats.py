"""The literal tuple of formats. A new format is one file and one line."""

from __future__ import annotations

from qlora_compile.errors import UnknownFormatError
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.fp4 import FP4
from qlora_compile.kernels.formats.int8 import INT8
from qlora_compile.kernels.formats.nf4 import NF4
from qlora_compile.kernels.layout import Layout

FORMATS: tuple[QuantFormat, ...] = (NF4, FP4, INT8)


def format_named(name: str) -> QuantFormat:
    """The format whose `name` is `name`. Raises UnknownFormatError."""
    for quant_format in FORMATS:
        if quant_format.name == name:
            return quant_format
    known = ", ".join(repr(quant_format.name) for quant_format in FORMATS)
    raise UnknownFormatError(value=name, known=known)


UNQUANTIZED = "none"
"""Format name of a weight kept in its own floating-point dtype."""


def plane_count(layout: Layout) -> int:
    """How many tensors a weight of `layout` is stored in."""
    if layout.format == UNQUANTIZED:
        return 1
    return 5 if layout.named.get("double_quantize") else 2
