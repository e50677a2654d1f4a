"""Targets: the architectures that every shipped launch is compiled for, by name."""

from __future__ import annotations

from qlora_compile.kernels.gpu.ahead_of_time import TARGETS

__all__ = ["TARGETS", "is_nvidia"]


def is_nvidia(arch: str) -> bool:
    """Of a key of TARGETS, the keyword of every table here."""
    return TARGETS[arch].backend == "cuda"
