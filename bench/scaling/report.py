"""Writes curves and their exponents as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from bench.peers.contenders import OURS, STOCK, STOCK_COMPILED
from bench.peers.race import Run
from bench.scaling.axes import FIRST_STEP, Axis
from bench.scaling.fit import Fit, two_digits
from bench.scaling.points import Points, curve, law, problems
from bench.scaling.quantities import FIRST, PEAK, SAVED, STEP, Quantity

FLAT_FROM, FLAT_TO, FLAT_TARGET = 8, 64, 1.3
"""Two depths, and how much longer compiling may take at the second than at the first."""

COLUMNS = (
    *(
        ("step s", lambda run: f"{STEP.of(run):.4f}"),
        ("peak MB", lambda run: f"{PEAK.of(run):.1f}"),
    ),
    ("saved MB", lambda run: f"{SAVED.of(run):.1f}"),
    ("build s", lambda run: f"{run.build:.2f}"),
    ("first step s", lambda run: f"{run.first:.2f}"),
)
"""Each told of ours, then of stock."""


def section(axis: Axis, points: Points) -> list[str]:
    """Return the lines of one axis: the table, then a line for every curve."""
    header = [f"{who} {column}" for column, _ in COLUMNS for who in ("ours", "stock")]
    lines = [f"## {axis.name}", "", f"{axis.fixed}.", "", _line([axis.size, *header])]
    lines.append(_line(["---:"] * (1 + len(header))))
    measured = [setting for setting in axis.settings if setting in points]
    for setting in measured:
        runs = points[setting]
        why = problems(runs)
        cells = ["; ".join(why), *[""] * (len(header) - 1)] if why else _cells(runs)
        lines.append(_line([str(axis.x(setting)), *cells]))
    lines.append("")
    lines += [f"- {told(axis, quantity, points)}" for quantity in axis.quantities]
    if axis == FIRST_STEP:
        lines += [f"- {line}" for line in (*flatness(points), *compiled(points))]
    return [*lines, ""]


def told(axis: Axis, quantity: Quantity, points: Points) -> str:
    """Describe one curve: its exponent beside stock's."""
    ours, stock = (law(axis, quantity, name, points) for name in (OURS, STOCK))
    if ours is None:
        return f"{quantity.name}: too few points for an exponent"
    beside = "not fitted: too few points" if stock is None else _exponent(stock)
    return (
        f"{quantity.name} ~ {axis.size}{_exponent(ours)}, every point within a factor of "
        f"{ours.off:.2f}, ^{two_digits(ours.last)} between the last two (stock {beside})."
    )


def flatness(points: Points) -> list[str]:
    """Return whether deep models compile as fast as shallow ones; nothing without measurements."""
    found = dict(zip(*curve(FIRST_STEP, FIRST, OURS, points), strict=True))
    if FLAT_FROM not in found or FLAT_TO not in found:
        return []
    ratio = found[FLAT_TO] / found[FLAT_FROM]
    return [
        f"{FIRST.name}, at {FLAT_TO} layers / at {FLAT_FROM}: {ratio:.3f}, target {FLAT_TARGET}: "
        f"{'met' if ratio <= FLAT_TARGET else 'not met'}"
    ]


def compiled(points: Points) -> list[str]:
    """Return lines about stock under torch.compile, if it was measured."""
    found = zip(*curve(FIRST_STEP, FIRST, STOCK_COMPILED, points), strict=True)
    return [f"{STOCK_COMPILED}, {layers} layers: {FIRST.name} {y:.2f} s" for layers, y in found]


def _exponent(law: Fit) -> str:
    return f"^{two_digits(law.exponent)} ± {law.error:.2f}"


def _cells(runs: list[Run]) -> list[str]:
    by_name = {run.name: run for run in runs}
    return [cell(by_name[name]) for _, cell in COLUMNS for name in (OURS, STOCK)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
