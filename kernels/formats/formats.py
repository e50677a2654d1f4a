"""The list of formats. A new format is one file and one line."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qlora_compile.errors import UnknownFormatError
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.errors import FormatTextError
from qlora_compile.kernels.formats.fp4 import FP4
from qlora_compile.kernels.formats.fp8 import FP8_E4M3, FP8_E5M2
from qlora_compile.kernels.formats.int8 import INT8
from qlora_compile.kernels.formats.integers import INT4, UINT8
from qlora_compile.kernels.formats.microscaling import MXFP4, NVFP4
from qlora_compile.kernels.formats.nf4 import NF4
from qlora_compile.kernels.layout import UNQUANTIZED as UNQUANTIZED
from qlora_compile.kernels.layout import Layout, Plane

FORMATS: list[QuantFormat] = [NF4, FP4, INT8, INT4, UINT8, FP8_E4M3, FP8_E5M2, MXFP4, NVFP4]
"""All formats; the first one of a number of bits is the usual one for that number."""


def register(quant_format: QuantFormat) -> None:
    """Add a format from outside the package, to be used like those that ship.

    Every process that uses the format has to register it.
    """
    FORMATS.append(quant_format)


def format_named(name: str) -> QuantFormat:
    """Return the format whose `name` is `name`. Raises UnknownFormatError."""
    for quant_format in FORMATS:
        if quant_format.name == name:
            return quant_format
    known = ", ".join(repr(quant_format.name) for quant_format in FORMATS)
    raise UnknownFormatError(value=name, known=known)


def format_written(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a format written as "int4:group_size=128,zeros=float".

    An unknown name is returned unchecked. Raises FormatTextError, or what the options raise."""
    name, _, listed = text.partition(":")
    found = next((each for each in FORMATS if each.name == name), None)
    options: dict[str, Any] = {}
    known = {} if found is None else {option.name: option for option in found.options}
    for pair in listed.split(",") if listed else ():
        option, equals, value = pair.partition("=")
        if not (option and equals and value):
            raise FormatTextError(value=text, pair=pair)
        options[option] = known[option].read(value) if option in known else value
    if found is not None:
        found.layout((1, 1), **options)
    return name, options


def format_of(layout: Layout) -> QuantFormat | None:
    """Return the format of a weight of `layout`; None where it is kept in its own dtype."""
    return format_named(layout.format) if layout.quantized else None


def planes_of(layout: Layout, dtype: torch.dtype = torch.float32) -> tuple[Plane, ...]:
    """Return the tensors in which a weight of `layout` is stored; for a weight kept in its own
    dtype, `dtype`, that is the weight itself."""
    quant_format = format_of(layout)
    if quant_format is None:
        return (Plane("weight", dtype, layout.shape),)
    return quant_format.planes(layout)


def plane_count(layout: Layout) -> int:
    """Return how many tensors a weight of `layout` is stored in."""
    return len(planes_of(layout))


@functools.lru_cache(maxsize=4096)
def plane_dtypes(layout: Layout) -> tuple[torch.dtype, ...]:
    """Return the dtypes of a stored weight's tensors; empty for a weight kept in its own dtype."""
    if layout.format == UNQUANTIZED:
        return ()
    return tuple(plane.dtype for plane in planes_of(layout))


def meta_tensors(layout: Layout, dtype: torch.dtype) -> list[Tensor]:
    """Return the planes of `planes_of` without data."""
    return [
        torch.empty(plane.shape, dtype=plane.dtype, device="meta")
        for plane in planes_of(layout, dtype)
    ]
