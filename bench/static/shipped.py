"""Every shipped launch, compiled and read: one row each, over as many processes as asked for."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from bench.static.compile import InterpretedKernelError, Launch
from bench.static.figures import Figures, figures


class ShippedLaunch(Protocol):
    """What is read of `bench.static.launches.ShippedLaunch`.

    config: the label and, after a comma, what is unusual about the launch."""

    @property
    def kernel(self) -> str: ...
    @property
    def format(self) -> str | None: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def decoder(self) -> str | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def double_quantized(self) -> bool: ...
    @property
    def config(self) -> str: ...
    @property
    def launch(self) -> Launch: ...
    @property
    def macs_per_iteration(self) -> int | None: ...


@dataclass(frozen=True)
class Row:
    """One shipped launch on one architecture. dtype: such as "bfloat16". config: its label. note:
    what is unusual about the launch, "" for the usual one. tile: (BM, BC, BR) of the main loop,
    None without one. error: why there are no figures, else None."""

    arch: str
    kernel: str
    format: str
    dtype: str
    decoder: str
    rank: int
    double_quantized: bool
    config: str
    note: str
    tile: tuple[int, int, int] | None
    figures: Figures | None
    error: str | None = None

    @property
    def name(self) -> str:
        """What tells this launch from the others on its architecture."""
        decoder = "" if self.config.startswith(self.decoder) else self.decoder
        absmax = "double" if self.double_quantized else ""
        rank = f"r={self.rank}"
        parts = (
            self.kernel,
            self.format,
            self.dtype,
            decoder,
            self.config,
            rank,
            absmax,
            self.note,
        )
        return " ".join(filter(None, parts))


STREAMS = ("dequantize",)
"""The kernels whose bytes are counted: every program of theirs does the same."""


@cache
def launches(arch: str) -> tuple[ShippedLaunch, ...]:
    """In the order in which the package gives them, the same in every process."""
    from bench.static.launches import shipped_launches

    return tuple(shipped_launches(arch))


def measure(arch: str, index: int) -> Row:
    """Compiles and reads the launch number `index` of `arch`. Raises what `figures` raises."""
    shipped = launches(arch)[index]
    found = figures(
        shipped.launch,
        arch,
        shipped.macs_per_iteration,
        decodes=bool(_given(shipped.decoder)),
        streams=shipped.kernel in STREAMS,
    )
    return row(arch, shipped, found)


def row(arch: str, shipped: ShippedLaunch, found: Figures | None, error: str | None = None) -> Row:
    config, _, note = shipped.config.partition(", ")
    sizes = shipped.launch.constexprs
    tiled = shipped.macs_per_iteration is not None and all(n in sizes for n in ("BM", "BC", "BR"))
    return Row(
        arch=arch,
        kernel=shipped.kernel,
        format=_given(shipped.format),
        dtype=str(shipped.dtype).removeprefix("torch."),
        decoder=_given(shipped.decoder),
        rank=shipped.rank,
        double_quantized=shipped.double_quantized,
        config=_given(config),
        note=note,
        tile=(sizes["BM"], sizes["BC"], sizes["BR"]) if tiled else None,
        figures=found,
        error=error,
    )


def _given(name: str | None) -> str:
    """The package writes "-" where there is nothing to name."""
    return "" if name in (None, "-") else name


def measure_all(
    archs: Sequence[str], kernels: Sequence[str] | None, jobs: int
) -> tuple[int, Iterator[Row]]:
    """How many rows there will be, and the rows as they come; `kernels`: None for all.

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
        asked: dict[Future[Row], tuple[str, int]] = {
            pool.submit(measure, arch, index): (arch, index) for arch, index in work
        }
        for future in as_completed(asked):
            arch, index = asked[future]
            if error := future.exception():
                # Triton prints the kernel's source first and the reason last.
                reason = str(error).strip().splitlines()[-1:] or ["no message"]
                text = f"{type(error).__name__}: {reason[0]}"
                yield row(arch, launches(arch)[index], None, text)
            else:
                yield future.result()
