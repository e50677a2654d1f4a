"""Compiles and reads every shipped launch, one row each, in any number of processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache

from bench.static.figures import Figures, figures
from bench.static.launches import ShippedLaunch, shipped_launches
from qlora_compile.errors import InterpretedKernelError

STREAMS = ("dequantize",)
"""Kernels that read and write every byte once, in programs without a loop."""


@dataclass(frozen=True)
class Row:
    """One shipped launch on one architecture. name: distinguishes it from the others there.
    multiplies: whether it has products for tensor cores. error: why there are no figures."""

    arch: str
    kernel: str
    name: str
    multiplies: bool
    figures: Figures | None
    error: str = ""


@cache
def launches(arch: str) -> tuple[ShippedLaunch, ...]:
    """Return the launches of `arch`, in the same order in every process."""
    return tuple(shipped_launches(arch))


def measure(arch: str, index: int) -> Row:
    """Compile and read the launch number `index` of `arch`. Raises what `figures` raises."""
    shipped = launches(arch)[index]
    found = figures(shipped.launch, arch, streams=shipped.kernel in STREAMS)
    return _row(arch, shipped, found)


def _row(arch: str, shipped: ShippedLaunch, found: Figures | None, error: str = "") -> Row:
    return Row(arch, shipped.kernel, shipped.name, shipped.multiplies, found, error)


def measure_all(
    archs: Sequence[str], kernels: Sequence[str] | None, jobs: int
) -> tuple[int, Iterator[Row]]:
    """Return the number of rows, and the rows in the order of launches. kernels: None for all.

    A launch that does not compile becomes a row with its error. Raises InterpretedKernelError if
    TRITON_INTERPRET is set: the kernels are then imported for the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise InterpretedKernelError(
            site="what is imported for the interpreter", value=os.environ["TRITON_INTERPRET"]
        )
    work = [
        (arch, index)
        for arch in archs
        for index, shipped in enumerate(launches(arch))
        if kernels is None or shipped.kernel in kernels
    ]
    return len(work), _rows(work, jobs)


def _rows(work: Sequence[tuple[str, int]], jobs: int) -> Iterator[Row]:
    # Spawned and not forked: torch and LLVM have threads, which a fork would lose.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        asked = [pool.submit(measure, arch, index) for arch, index in work]
        for (arch, index), future in zip(work, asked, strict=True):
            if error := future.exception():
                # Triton prints the kernel's source first and the reason last.
                reason = str(error).strip().splitlines()[-1:] or ["no message"]
                text = f"{type(error).__name__}: {reason[0]}"
                yield _row(arch, launches(arch)[index], None, text)
            else:
                yield future.result()
