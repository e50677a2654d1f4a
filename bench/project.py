"""Projects training steps on GPUs from models of cards and kernels: nothing is run or measured.

Writes bench/results/projection.{md,json,png}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.projection.plot import plot
from bench.projection.report import TOKENS, as_json, markdown, project

RESULTS = Path(__file__).parent / "results"


def main(
    checkpointing: Annotated[
        bool, typer.Option(help="Whether blocks compute their forward again in the backward.")
    ] = True,
    output: Annotated[Path, typer.Option(help="Folder for projection.{md,json,png}.")] = RESULTS,
) -> None:
    """Model the step of every model on every card."""
    rows = project(checkpointing)
    (output / "projection.md").write_text(markdown(rows))
    (output / "projection.json").write_text(as_json(rows))
    first = [row for row in rows if (row.step.batch, row.step.length) == TOKENS[0]]
    plot(first, output / "projection.png")
    for row in rows:
        times = ", ".join(f"{name} {1e3 * s.total:.0f}" for name, s in row.sides.items())
        tokens = f"{row.step.batch} x {row.step.length}"
        typer.echo(f"{row.step.model.name}, {row.device.name}, {tokens}: modelled ms: {times}")


if __name__ == "__main__":
    typer.run(main)
