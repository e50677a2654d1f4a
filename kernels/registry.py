"""The literal tuples of what there is to choose from. A new format is one file and one line."""

from __future__ import annotations

from qlora_compile.errors import NoVariantError, UnknownFormatError
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.fp4 import FP4
from qlora_compile.kernels.formats.int8 import INT8
from qlora_compile.kernels.formats.nf4 import NF4
from qlora_compile.kernels.variants.base import Variant
from qlora_compile.kernels.variants.dense import Dense
from qlora_compile.problem import Problem

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

VARIANTS: tuple[Variant, ...] = (Dense(),)


def select(problem: Problem) -> Variant:
    """The variant that computes `problem`: the first that does not reject it.

    Raises NoVariantError with every variant's reasons when all do.
    """
    reasons = {variant.name: variant.rejects(problem) for variant in VARIANTS}
    for variant in VARIANTS:
        if not reasons[variant.name]:
            return variant
    listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
    raise NoVariantError(problem=problem, reasons=listed)
