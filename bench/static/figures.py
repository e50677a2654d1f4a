"""Counts figures in the binary of one launch."""

from __future__ import annotations

from dataclasses import dataclass

from bench.static import sass
from bench.static.amdgcn import amdgcn_resources
from bench.static.memory import Traffic, traffic
from bench.static.occupancy import ctas_per_sm
from bench.static.resources import Resources, sass_resources
from qlora_compile.kernels.gpu.ahead_of_time import TARGETS, compile_launch
from qlora_compile.kernels.gpu.launch import Launch


@dataclass(frozen=True)
class Figures:
    """The figures of one launch on one architecture. ctas: how many fit on an SM. traffic: that of
    a kernel that streams; None on AMD, and for a loop whose count the binary does not tell."""

    resources: Resources
    ctas: int
    traffic: Traffic | None


def figures(launch: Launch, arch: str, *, streams: bool = False) -> Figures:
    """Compile `launch` for `arch`, a key of TARGETS, and read the binary.

    streams: whether it reads codes and writes weights once each, so that its bytes can be
    counted."""
    compiled = compile_launch(launch, TARGETS[arch])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if TARGETS[arch].backend == "hip":
        resources = amdgcn_resources(compiled.asm["amdgcn"], shared_bytes=shared, warps=warps)
        return Figures(resources, ctas_per_sm(resources, arch), None)
    cubin = compiled.asm["cubin"]
    code = sass.parse(sass.disassemble(cubin))
    usage = sass.resource_usage(cubin)
    resources = sass_resources(code, usage, shared_bytes=shared, warps=warps)
    moved = traffic(resources, launch) if streams and not sass.has_loop(code) else None
    return Figures(resources, ctas_per_sm(resources, arch), moved)
