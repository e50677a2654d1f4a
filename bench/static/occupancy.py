"""How many CTAs fit on one SM (or compute unit) at a time."""

from __future__ import annotations

from bench.static.resources import Resources
from bench.static.sm_table import COMPUTE_UNITS, MULTIPROCESSORS, SUBCORES

_REGISTER_GRANULE = 8
_RESERVED_SHARED_BYTES = 1024
"""The driver's own share of every CTA's shared memory."""


def ctas_per_sm(resources: Resources, arch: str) -> int:
    """The number that registers, shared memory and warp slots allow; 0 if not even one fits."""
    return min(limits(resources, arch).values())


def limits(resources: Resources, arch: str) -> dict[str, int]:
    """What each resource alone would allow."""
    if arch in COMPUTE_UNITS:
        unit = COMPUTE_UNITS[arch]
        registers = _rounded(resources.registers, unit.granule)
        waves = min(unit.waves, unit.registers // max(registers, 1))
        return {
            "registers": waves * SUBCORES // resources.warps,
            "shared memory": unit.shared_bytes // max(resources.shared_bytes, 1),
        }
    sm = MULTIPROCESSORS[arch]
    registers = _rounded(resources.registers, _REGISTER_GRANULE) * 32 * resources.warps
    return {
        "registers": sm.registers // registers,
        "shared memory": sm.shared_bytes // (resources.shared_bytes + _RESERVED_SHARED_BYTES),
        "warps": sm.warps // resources.warps,
        "CTAs": sm.ctas,
    }


def _rounded(count: int, granule: int) -> int:
    return -(-count // granule) * granule
