"""Every format, with each option that changes its speed or its error, by a name for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_compile.kernels.formats.formats import FORMATS


@dataclass(frozen=True)
class FormatCase:
    """options: as `QuantFormat.quantize` takes them."""

    format: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the command line's --format writes it."""
        listed = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.format}:{listed}".lower() if listed else self.format


_MORE: dict[str, tuple[dict[str, Any], ...]] = {
    "nf4": ({"double_quantize": True},),
    "int4": (
        {"group_size": 32},
        {"group_size": 32, "zeros": "float", "scales": "float16"},
        {"group_size": 128},
        {"zeros": "none"},
        {"zeros": "float"},
        {"zeros": "float", "refine": True},
    ),
    "uint8": ({"group_size": 32}, {"group_size": "row"}),
    "fp8_e4m3": ({"scale_per": "tensor"}, {"scale_per": "block"}),
}
"""Options beside the defaults."""


def cases() -> list[FormatCase]:
    """All formats of the registry, NF4 first."""
    return [
        FormatCase(each.name, options)
        for each in FORMATS
        for options in ({}, *_MORE.get(each.name, ()))
    ]
