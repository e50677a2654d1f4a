"""Ahead-of-time compilation: a Launch and an architecture give a real binary, on any machine.

Signature, constants and attributes come from Triton's own argument binder, the one that its JIT
asks at launch, so the binary is the one that a device of that architecture would be given.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from bench.static.targets import TARGETS


class Launch(Protocol):
    """What is read of `qlora_compile.kernels.gpu.launch.Launch`."""

    @property
    def kernel(self) -> Any: ...
    @property
    def grid(self) -> tuple[int, ...]: ...
    @property
    def arguments(self) -> dict[str, Any]: ...
    @property
    def constexprs(self) -> dict[str, Any]: ...
    @property
    def compile_options(self) -> dict[str, Any]: ...


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


class InterpretedKernelError(RuntimeError):
    """A kernel that was decorated for Triton's interpreter cannot be compiled."""


class CompilationError(RuntimeError):
    """The compiler reported an error and yet returned a binary."""


def compile_launch(launch: Launch, arch: str) -> CompiledKernel:
    """Compiles for `arch`, a key of TARGETS.

    Raises InterpretedKernelError where TRITON_INTERPRET was set when the kernel was decorated,
    CompilationError where LLVM printed an error, and what Triton itself raises.
    """
    if not isinstance(launch.kernel, JITFunction):
        setting = os.environ.get("TRITON_INTERPRET")
        raise InterpretedKernelError(
            f"{launch.kernel!r} cannot be compiled: it is a {type(launch.kernel).__name__}, not a "
            f"JITFunction. TRITON_INTERPRET is {setting!r} and must be unset before the kernels "
            "are imported."
        )
    target = TARGETS[arch]
    source, options = _bind(launch, target)
    start = time.perf_counter()
    with _diagnostics() as diagnostics, knobs.compilation.scope():
        # LLVM prints an error for inline assembly that AMD does not know, and goes on without it;
        # a kernel from the cache would not say so again.
        knobs.compilation.always_compile = target.backend == "hip"
        compiled = triton.compile(source, target=target, options=options)
    errors = [line for line in diagnostics if line.startswith("error:")]
    if errors:
        raise CompilationError(f"{compiled.metadata.name} for {arch}: {'; '.join(set(errors))}")
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


@contextmanager
def _diagnostics() -> Iterator[list[str]]:
    """Collects the lines that native code prints to standard error, and passes them on."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")
            lines += text.splitlines()
            sys.stderr.write(text)


def _bind(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What the JIT makes of the arguments: the source to compile and the full options."""
    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(
        **launch.arguments, **launch.constexprs, **launch.compile_options
    )
    options, signature, constants, attributes = kernel._pack_args(
        backend, rest, bound, specialization, rest
    )
    return ASTSource(kernel, signature, constants, attributes), vars(options)
