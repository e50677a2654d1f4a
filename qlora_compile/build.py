"""Compiles the Triton kernels that problems need, for a GPU that this machine may lack."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import qlora_compile
from qlora_compile.errors import ArchitectureError, NoKernelsError, TritonMissingError
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import HANDFUL
from qlora_compile.outputs import writable_directory

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.needed import NeededKernel


@dataclass(frozen=True)
class BuiltKernel:
    """One compiled kernel.

    key: the key in Triton's cache. variants: the variants that need the kernel. seconds: the time
    to compile it, nearly 0 if the folder held it already. size: the bytes of its files.
    """

    key: str
    name: str
    variants: tuple[str, ...]
    seconds: float
    size: int


def build(
    problems: Sequence[Problem],
    arch: str,
    output: Path,
    *,
    limit: int | None = HANDFUL,
    jobs: int = 1,
    on_kernel: Callable[[int, int], None] | None = None,
) -> list[BuiltKernel]:
    """Compile for `arch` the kernels that the best candidates for each problem launch.

    arch: such as "sm_90" or "gfx942". output: a folder that is created, in the form of Triton's
    cache, for a machine with the same Triton and the same qlora_compile; kernels that it holds
    already are not compiled again. limit: the number of candidates for each problem, None for all;
    by default as many as the tuner would measure. jobs: the number of processes. on_kernel: called
    with the numbers of kernels done and of all kernels.

    Raises:
        ArchitectureError, TritonMissingError, OutputDirectoryError, NoKernelsError: nothing can be
            built, and nothing was.
        InterpretedKernelError: Triton was imported for its interpreter.
        CompilationError, and Triton's own errors: a kernel does not compile; kernels compiled
            before it stay in `output`.
    """
    check_arch(arch)
    from qlora_compile.kernels.gpu.needed import needed_kernels

    writable_directory(output)
    needed = needed_kernels(problems, arch, limit)
    if not needed:
        raise NoKernelsError(
            value=f"what is asked for ({len(problems)} problems)",
            target=arch,
            problem="the vendor's GEMM computes all of it",
        )
    kernels: list[BuiltKernel] = []
    for kernel in _compiled(needed, arch, output.absolute(), jobs):
        kernels.append(kernel)
        if on_kernel is not None:
            on_kernel(len(kernels), len(needed))
    _write_manifest(output, arch, limit, kernels, problems)
    return kernels


def check_arch(arch: str) -> None:
    """Raise TritonMissingError without Triton, ArchitectureError if `arch` is not supported."""
    if importlib.util.find_spec("triton") is None:
        raise TritonMissingError(purpose="building kernels")
    from qlora_compile.kernels.gpu.ahead_of_time import TARGETS

    if arch not in TARGETS:
        raise ArchitectureError(value=arch, known=", ".join(TARGETS))


def _compiled(
    needed: Sequence[NeededKernel], arch: str, folder: Path, jobs: int
) -> Iterator[BuiltKernel]:
    one = partial(_build_kernel, arch=arch, folder=folder)
    if jobs == 1:
        yield from map(one, needed)
        return
    # Spawned, not forked: torch and LLVM have threads, which a forked process would lack.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(needed)), mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(one, kernel) for kernel in needed]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _build_kernel(kernel: NeededKernel, arch: str, folder: Path) -> BuiltKernel:
    from triton import knobs

    from qlora_compile.kernels.gpu.ahead_of_time import TARGETS, compile_launch

    start = time.perf_counter()
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(folder)
        # Most bytes belong to earlier stages of compilation, which no launch reads.
        knobs.compilation.store_binary_only = True
        compiled = compile_launch(kernel.launch(arch), TARGETS[arch])
    assert compiled.hash == kernel.key
    seconds = time.perf_counter() - start
    size = sum(os.path.getsize(path) for path in compiled.metadata_group.values())
    return BuiltKernel(kernel.key, kernel.name, kernel.variants, seconds, size)


def _write_manifest(
    output: Path,
    arch: str,
    limit: int | None,
    kernels: Iterable[BuiltKernel],
    problems: Iterable[Problem],
) -> None:
    import triton
    from triton.compiler import make_backend

    from qlora_compile.kernels.gpu.ahead_of_time import TARGETS
    from qlora_compile.kernels.gpu.built_cache import MANIFEST, builder

    manifest = {
        "arch": arch,
        "qlora_compile": qlora_compile.__version__,
        "triton": triton.__version__,
        "compiler": make_backend(TARGETS[arch]).hash(),
        "builder": builder(),
        "candidates_per_problem": limit,
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
        "problems": [_plain(problem) for problem in problems],
    }
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _plain(problem: Problem) -> dict[str, object]:
    fields = dataclasses.asdict(problem) | {"layout": str(problem.layout)}
    del fields["device"]
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in fields.items()
    }
