"""Ahead-of-time compilation: makes a real binary of a Launch for a target, on any machine.

Signature, constants and attributes come from Triton's own argument binder, which its JIT uses at
launch. So the binary is the one that a device of the target would run, stored under the key by
which Triton's JIT would look for it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import JITFunction, create_function_from_signature

from qlora_compile.errors import CompilationError, InterpretedKernelError

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.launch import Launch

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
"""The targets, by the names that `target_of` returns."""


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Return Triton's CompiledKernel, from Triton's cache if it is there.

    Raises InterpretedKernelError if TRITON_INTERPRET was set when the kernel was decorated,
    CompilationError if LLVM printed an error, and what Triton itself raises.
    """
    source, options = _bind(launch, target)
    with _diagnostics() as diagnostics, knobs.compilation.scope():
        # LLVM prints an error for inline assembly that AMD does not know, and goes on without it;
        # a kernel from the cache would not say so again.
        knobs.compilation.always_compile = target.backend == "hip"
        compiled = triton.compile(source, target=target, options=options)
    errors = {line for line in diagnostics if line.startswith("error:")}
    if errors:
        raise CompilationError(
            site=compiled.metadata.name, value=target.arch, problem="; ".join(sorted(errors))
        )
    return compiled


def cache_key(launch: Launch, target: GPUTarget) -> str:
    """Return the `hash` of `compile_launch`'s result without compiling; raise as it does."""
    source, options = _bind(launch, target)
    backend = make_backend(target)
    environment = get_cache_invalidating_env_vars()
    key = get_cache_key(source, backend, backend.parse_options(options), environment)
    return hashlib.sha256(key.encode()).hexdigest()


def _bind(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """Return the source to compile and the full options, as the JIT derives them."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise InterpretedKernelError(
            site=f"{kernel.fn.__qualname__}, a {type(kernel).__name__},",
            value=os.environ.get("TRITON_INTERPRET"),
        )
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**launch.arguments, **launch.constexprs, **launch.compile_options}
    bound, specialization, rest = binder(**given)
    options, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, specialization, rest
    )
    return ASTSource(kernel, signature, constants, attributes), vars(options)


@contextmanager
def _diagnostics() -> Iterator[list[str]]:
    """Collect the lines that native code prints to standard error, and pass them on."""
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
