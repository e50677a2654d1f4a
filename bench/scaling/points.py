"""The measurements along an axis, and the curves in them."""

from __future__ import annotations

from collections.abc import Mapping

from bench.peers.race import Run
from bench.peers.settings import Setting
from bench.peers.table import disagreement
from bench.scaling.axes import Axis
from bench.scaling.fit import Fit, fit
from bench.scaling.quantities import Quantity

Points = Mapping[Setting, list[Run]]
"""By setting; an axis takes its own, and those that were not measured are left out."""


def problems(runs: list[Run]) -> list[str]:
    """Return why a point belongs to no curve: contenders that failed, losses unlike stock's."""
    failed = [f"{run.name} failed: {run.failed}" for run in runs if run.failed]
    return failed or disagreement(runs)


def curve(
    axis: Axis, quantity: Quantity, name: str, points: Points
) -> tuple[list[int], list[float]]:
    """Return x and the quantity of the contender `name`, at points where it has a logarithm."""
    xs, ys = [], []
    for setting in axis.settings:
        runs = points.get(setting, [])
        if problems(runs):
            continue
        for value in (quantity.of(run) for run in runs if run.name == name):
            if value > 0:
                xs.append(axis.x(setting))
                ys.append(value)
    return xs, ys


def law(axis: Axis, quantity: Quantity, name: str, points: Points) -> Fit | None:
    """Return the law through the points, None for fewer than three."""
    xs, ys = curve(axis, quantity, name, points)
    return fit(xs, ys) if len(xs) >= 3 else None
