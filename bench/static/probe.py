"""One launch on one architecture, on the screen: for tuning a kernel without a device.

    python -m bench.static.probe MODULE:FUNCTION --arch sm_90 --macs 128x128x64

FUNCTION takes nothing and returns a Launch or several; `probe` does the same from Python.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from bench.static.compile import Launch
from bench.static.figures import Figures, figures
from bench.static.occupancy import limits
from bench.static.targets import TARGETS


def probe(
    launch: Launch, arch: str, macs: int | None = None, *, decodes: bool = True, label: str = ""
) -> Figures:
    """Prints the figures of `launch` and returns them. macs: BM·BN·BK; None: no tensor loop."""
    found = figures(launch, arch, macs, decodes=decodes, streams=macs is None)
    print(f"{arch} {label} {describe(found, arch)}", flush=True)
    return found


def describe(found: Figures, arch: str) -> str:
    """The figures in one paragraph."""
    taken = found.resources
    parts = [
        f"registers {taken.registers} spills {taken.spills} stack {taken.stack_bytes}"
        f" shared {taken.shared_bytes / 1024:.1f}K CTAs {found.ctas} {limits(taken, arch)}",
        f"loads {_widths(taken.loads)} stores {_widths(taken.stores)} tensor {dict(taken.tensor)}",
    ]
    if found.loop:
        parts.append(f"loop {found.loop_instructions}: {found.loop}")
    if found.decode:
        split = {kind: round(count, 2) for kind, count in found.decode.items()}
        parts.append(f"decode per 8 weights {found.decode_instructions:.2f}: {split}")
    if use := found.utilization:
        parts.append(
            f"modelled utilization {use.tensor:.3f} with {use.ctas} CTAs, {use.alone:.3f} with 1;"
            f" period {use.period:.0f} overhead {use.overhead:.0f} cycles"
        )
    elif found.loop:
        parts.append("utilization not modelled")
    if moved := found.traffic:
        bounds = {
            name: f"SM {bound.sm_cycles:.0f} DRAM {bound.dram_cycles:.0f}"
            for name, bound in moved.bounds.items()
        }
        parts.append(
            f"moved {moved.moved} bytes, minimum {moved.minimum} ({moved.excess:+.2%}),"
            f" wide {moved.wide}; modelled cycles per program {bounds}"
        )
    return "\n    ".join([*parts, f"compiled in {found.seconds:.1f} s"])


def _widths(accesses: dict[int, int]) -> str:
    return " ".join(f"{bits}b×{count}" for bits, count in sorted(accesses.items())) or "none"


def main(
    source: Annotated[str, typer.Argument(help="MODULE:FUNCTION, which returns launches")],
    arch: Annotated[list[str], typer.Option(help="sm_80 … gfx950; may be given again")],
    macs: Annotated[str, typer.Option(help="the tile of the main loop, such as 128x128x64")] = "",
) -> None:
    """Compiles and prints; nothing is written."""
    module, _, function = source.partition(":")
    launches: Any = getattr(importlib.import_module(module), function)()
    if not isinstance(launches, Iterable):
        launches = [launches]
    tile = math.prod(int(size) for size in macs.split("x")) if macs else None
    for number, launch in enumerate(launches):
        for name in arch:
            if name not in TARGETS:
                raise typer.BadParameter(f"unknown --arch {name}: one of {', '.join(TARGETS)}")
            probe(launch, name, tile, label=f"[{number}]")


if __name__ == "__main__":
    typer.run(main)
