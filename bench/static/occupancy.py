"""Computes how many CTAs fit on one SM (or compute unit) at a time."""

from __future__ import annotations

from dataclasses import dataclass

from bench.static.resources import Resources

_REGISTER_GRANULE = 8
_RESERVED_SHARED_BYTES = 1024
"""The driver's own share of every CTA's shared memory."""


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one SM. registers: of 32 bits. shared_bytes: the largest sum over CTAs."""

    shared_bytes: int
    warps: int = 64
    ctas: int = 32
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(163 << 10),
    "sm_86": Multiprocessor(99 << 10, warps=48, ctas=16),
    "sm_89": Multiprocessor(99 << 10, warps=48, ctas=24),
    "sm_90": Multiprocessor(227 << 10),
    "sm_100": Multiprocessor(227 << 10),
    "sm_120": Multiprocessor(99 << 10, warps=48, ctas=24),
}


@dataclass(frozen=True)
class ComputeUnit:
    """The limits of AMD's SM. registers: per lane of a SIMD, vector and accumulation registers
    together. waves: per SIMD."""

    shared_bytes: int
    registers: int = 512
    waves: int = 8
    simds: int = 4


COMPUTE_UNITS = {"gfx942": ComputeUnit(64 << 10), "gfx950": ComputeUnit(160 << 10)}


def ctas_per_sm(resources: Resources, arch: str) -> int:
    """Return how many CTAs registers, shared memory and warp slots allow, perhaps 0."""
    return min(limits(resources, arch).values())


def limits(resources: Resources, arch: str) -> dict[str, int]:
    """Return how many CTAs each resource alone would allow."""
    per_lane = -(-resources.registers // _REGISTER_GRANULE) * _REGISTER_GRANULE
    if arch in COMPUTE_UNITS:
        unit = COMPUTE_UNITS[arch]
        waves = min(unit.waves, unit.registers // max(per_lane, 1))
        return {
            "registers": waves * unit.simds // resources.warps,
            "shared memory": unit.shared_bytes // max(resources.shared_bytes, 1),
        }
    sm = MULTIPROCESSORS[arch]
    return {
        "registers": sm.registers // (per_lane * 32 * resources.warps),
        "shared memory": sm.shared_bytes // (resources.shared_bytes + _RESERVED_SHARED_BYTES),
        "warps": sm.warps // resources.warps,
        "CTAs": sm.ctas,
    }
