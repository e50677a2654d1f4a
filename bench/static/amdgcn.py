"""Reads a kernel's figures off AMD's assembly text: the compiler's metadata, and the opcodes."""

from __future__ import annotations

import re
from collections import Counter

from bench.static.resources import Resources

_METADATA = re.compile(r"^\s*(?:-\s+)?\.(\w+):\s+(\d+)\s*$", re.MULTILINE)
_OPCODE = re.compile(r"^\s+([a-z]\w+)", re.MULTILINE)
_GLOBAL = re.compile(r"(?:global|buffer|flat)_(load|store|atomic)_(\w+)")
_BITS = {
    **{"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8},
    **{"b128": 128, "b96": 96, "b64": 64, "b32": 32, "b16": 16, "b8": 8},
}
_UNITS = {
    **{"v": "vector", "s": "scalar", "ds": "shared memory", "scratch": "spill"},
    **dict.fromkeys(("global", "buffer", "flat"), "global memory"),
}
_NEEDED = (
    *("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count"),
    *("private_segment_fixed_size",),
)


class AssemblyError(RuntimeError):
    """AMD assembly text without the metadata or with an access that this parser does not know."""


def amdgcn_resources(text: str, *, shared_bytes: int, warps: int) -> Resources:
    """Return registers, spills and accesses of the one kernel in `text`.

    Scratch counts as spilling, as our kernels do not use it otherwise. Raises AssemblyError.
    """
    metadata = {name: int(value) for name, value in _METADATA.findall(text)}
    missing = [name for name in _NEEDED if name not in metadata]
    if missing:
        raise AssemblyError(f"no .{missing[0]} in the assembly's metadata")
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    tensor: Counter[str] = Counter()
    mix: Counter[str] = Counter()
    for opcode in _OPCODE.findall(text):
        matrix = opcode.startswith("v_mfma")
        mix["mfma" if matrix else _UNITS.get(opcode.partition("_")[0], "other")] += 1
        if found := _GLOBAL.fullmatch(opcode):
            (loads if found.group(1) == "load" else stores)[_bits(opcode, found.group(2))] += 1
        elif matrix:
            tensor[opcode] += 1
    return Resources(
        registers=metadata["vgpr_count"],
        stack_bytes=metadata["private_segment_fixed_size"],
        spills=mix["spill"] + metadata["vgpr_spill_count"],
        shared_bytes=shared_bytes,
        warps=warps,
        loads=dict(loads),
        stores=dict(stores),
        tensor=dict(tensor),
        mix=dict(mix),
        accumulators=metadata.get("agpr_count", 0),
        scalars=metadata["sgpr_count"],
        parked_scalars=metadata["sgpr_spill_count"],
    )


def _bits(opcode: str, suffix: str) -> int:
    """Return bits per lane, the widest size in the suffix (ubyte_d16, lds_dwordx4, add_f32)."""
    for part in suffix.split("_"):
        for name, bits in _BITS.items():
            if part in (name, f"u{name}", f"s{name}"):
                return bits
        if found := re.fullmatch(r"(?:pk)?[fiu](16|32|64)|bf16|x2", part):
            return int(found.group(1) or 32)
    if suffix in ("add", "cmpswap", "swap", "or", "and", "umax", "smax", "umin", "smin"):
        return 32
    raise AssemblyError(f"unknown width of a global access: {opcode}")
