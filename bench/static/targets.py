"""Targets: the architectures that every shipped launch is compiled for, by name."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
"""Keyword of every table here: what `shipped_launches` and the `--arch` option are given."""


def is_nvidia(arch: str) -> bool:
    return TARGETS[arch].backend == "cuda"
