"""Measures how qlora_compile's training step scales with tokens, rank, depth and width, beside
stock's.

A point is a model of one size. Every contender has a process of its own, with empty caches; steps
are taken in turn. Prints the figures and writes bench/results/scaling.{md,json,png}.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bench.measured_on import in_words, measured_on
from bench.peers.contenders import OURS, STOCK, STOCK_COMPILED
from bench.peers.race import Run, race
from bench.peers.settings import Setting
from bench.scaling.axes import AXES, COMPILED_LAYERS, FIRST_STEP, Axis, parts_of
from bench.scaling.plot import plot
from bench.scaling.points import Points, law, problems
from bench.scaling.quantities import STEP
from bench.scaling.report import section

RESULTS = Path(__file__).parents[1] / "results"
STEPS = 5


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Axes; all by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each contender.")] = STEPS,
    compiled: Annotated[
        bool, typer.Option(help="Stock under torch.compile too, at two depths of the first step.")
    ] = False,
) -> None:
    """Fit step time, memory and compiling time over tokens, rank, depth and width."""
    for name in names or ():
        if name not in AXES:
            raise typer.BadParameter(f"{name!r}; there are {', '.join(AXES)}")
    axes = [axis for axis in AXES.values() if not names or axis.name in names]
    points: dict[Setting, list[Run]] = {}
    for setting in dict.fromkeys(setting for axis in axes for setting in axis.settings):
        contenders = [OURS, STOCK]
        if compiled and setting in FIRST_STEP.settings and setting.layers in COMPILED_LAYERS:
            contenders.append(STOCK_COMPILED)
        start = time.perf_counter()
        # The first step, which compiles and tunes, is not among the timed ones.
        points[setting] = race(setting, contenders, steps + 1)
        taken = time.perf_counter() - start
        typer.echo(f"{_point(setting, points[setting])} ({taken:.0f} s)")
    for axis in axes:
        typer.echo("\n".join(section(axis, points)))
    if not names and not compiled and steps == STEPS:
        _write(axes, points)


def _point(setting: Setting, runs: list[Run]) -> str:
    """Return a point in one line."""
    found = problems(runs) or [
        f"{run.name}: step {STEP.of(run):.4f} s, peak {run.peak / 1e6:.0f} MB, "
        f"build {run.build:.1f} s, first {run.first:.1f} s"
        for run in runs
    ]
    return f"{', '.join(parts_of(setting).values())}: {'; '.join(found)}"


def _write(axes: list[Axis], points: Points) -> None:
    surroundings = measured_on()
    laws = [
        {"axis": axis.name, "quantity": quantity.name, "contender": name, "law": asdict(fitted)}
        for axis in axes
        for quantity in axis.quantities
        for name in (OURS, STOCK)
        if (fitted := law(axis, quantity, name, points)) is not None
    ]
    measured = [{"setting": asdict(s), "runs": [asdict(r) for r in rs]} for s, rs in points.items()]
    content = {**surroundings, "laws": laws, "points": measured}
    (RESULTS / "scaling.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        *("# Scaling", ""),
        f"By `make bench-scaling`: {in_words(surroundings)}.",
        "Blocks of a Llama with random weights, bfloat16, NF4, adapters on all linears; stock is",
        f"{STOCK}. Step time: the median of {STEPS}, in turn. Peak and saved: bytes that a step",
        "holds at most, and from forward to backward, beyond weights, adapters and the optimiser's",
        "state. Build: quantising and wrapping the model. First step: with empty caches, compiling",
        "and tuning included. An exponent is the slope of a line through the logarithms by least",
        "squares, over all points of its axis, ± its standard error.",
        *("", "![The curves](scaling.png)", ""),
    ]
    for axis in axes:
        lines += section(axis, points)
    (RESULTS / "scaling.md").write_text("\n".join(lines))
    plot(points, RESULTS / "scaling.png")


if __name__ == "__main__":
    typer.run(main)
