"""Draws the curves, on logarithmic axes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.peers.contenders import OURS, STOCK
from bench.scaling.axes import AXES, Axis
from bench.scaling.fit import two_digits
from bench.scaling.points import Points, curve, law
from bench.scaling.quantities import Quantity

COLOURS = {OURS: "C0", STOCK: "C7"}
MARKS = (("o", "-"), ("s", "--"))
"""The styles of a panel's first and second quantity."""


def plot(points: Points, file: Path) -> None:
    """Draw a row for each axis, with points, and fitted laws as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(AXES), 2, figsize=(14, 2.8 * len(AXES)), squeeze=False, layout="constrained"
    )
    for axis, row in zip(AXES.values(), rows, strict=True):
        for quantities, axes in zip(axis.panels, row, strict=True):
            _panel(axes, axis, quantities, points)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _panel(axes: Any, axis: Axis, quantities: tuple[Quantity, ...], points: Points) -> None:
    from matplotlib.ticker import LogLocator

    for quantity, (marker, line) in zip(quantities, MARKS, strict=False):
        for name, colour in COLOURS.items():
            xs, ys = curve(axis, quantity, name, points)
            fitted = law(axis, quantity, name, points)
            label = f"{name}, {quantity.name}"
            if fitted is not None:
                axes.plot(xs, [fitted(x) for x in xs], line, color=colour, linewidth=1)
                label += f": ^{two_digits(fitted.exponent)}"
            axes.plot(xs, ys, marker, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # At least a decade: what is flat must look flat.
    room = max(1.0, math.sqrt(10 * low / high))
    axes.set_ylim(low / room, high * room)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    xs = [axis.x(setting) for setting in axis.settings]
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.set_xlabel(axis.size)
    axes.set_ylabel(quantities[0].unit)
    axes.set_title(f"{axis.name}: {axis.fixed}", fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
