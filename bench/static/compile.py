"""One launch compiled ahead of time, as the figures read it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from qlora_compile.errors import InterpretedKernelError
from qlora_compile.kernels.gpu import ahead_of_time
from qlora_compile.kernels.gpu.ahead_of_time import TARGETS, Launch

__all__ = ["CompiledKernel", "InterpretedKernelError", "Launch", "compile_launch"]


@dataclass(frozen=True)
class CompiledKernel:
    """The binary of one launch.

    warps: per CTA (64 lanes each on AMD). shared_bytes: static and dynamic, per CTA.
    cubin: the ELF image; empty on AMD. amdgcn: the assembly; empty on NVIDIA.
    seconds: what compiling took, nearly nothing where Triton's cache knew the kernel.
    """

    arch: str
    name: str
    warps: int
    shared_bytes: int
    cubin: bytes
    amdgcn: str
    seconds: float


def compile_launch(launch: Launch, arch: str) -> CompiledKernel:
    """Compiles for `arch`, a key of TARGETS; raises as `ahead_of_time.compile_launch`."""
    start = time.perf_counter()
    compiled = ahead_of_time.compile_launch(launch, TARGETS[arch])
    seconds = time.perf_counter() - start
    return CompiledKernel(
        arch=arch,
        name=compiled.metadata.name,
        warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        cubin=compiled.asm.get("cubin", b""),
        amdgcn=compiled.asm.get("amdgcn", ""),
        seconds=seconds,
    )
