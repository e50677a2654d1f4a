"""Prints figures of the binary of one launch on one architecture, for tuning a kernel.

    python -m bench.static.probe MODULE:FUNCTION --arch sm_90

FUNCTION takes nothing and returns a Launch or several.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from bench.static.figures import figures
from bench.static.report import describe
from qlora_compile.kernels.gpu.ahead_of_time import TARGETS


def main(
    source: Annotated[str, typer.Argument(help="MODULE:FUNCTION, which returns launches")],
    arch: Annotated[list[str], typer.Option(help="sm_80 … gfx950; may be given again")],
) -> None:
    """Compile and print; write nothing."""
    module, _, function = source.partition(":")
    launches: Any = getattr(importlib.import_module(module), function)()
    if not isinstance(launches, Iterable):
        launches = [launches]
    for number, launch in enumerate(launches):
        for name in arch:
            if name not in TARGETS:
                raise typer.BadParameter(f"unknown --arch {name}: one of {', '.join(TARGETS)}")
            print(f"{name} [{number}] {describe(figures(launch, name), name)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
