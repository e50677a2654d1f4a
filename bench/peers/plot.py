"""Draws step time and memory of every contender, side by side."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.peers.contenders import FLOOR, TORCH_FLOOR
from bench.peers.race import Run
from bench.peers.table import disagreement


def plot(results: list[tuple[str, list[Run]]], file: Path) -> None:
    """Draw a row for each title: seconds of a step with quartiles, and bytes beyond the weights."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    floors = (FLOOR, TORCH_FLOOR)
    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(11, 2.6 * len(results)), squeeze=False, layout="constrained"
    )
    for (title, runs), (left, right) in zip(results, axes, strict=True):
        shown = [run for run in runs if not run.failed]
        names = [run.name for run in shown]
        colours = ["C3" if n in floors else "C0" if i == 0 else "C7" for i, n in enumerate(names)]
        if not disagreement(runs):
            quartiles = [statistics.quantiles(run.seconds, n=4) for run in shown]
            medians = [each[1] for each in quartiles]
            errors = [[q[1] - q[0] for q in quartiles], [q[2] - q[1] for q in quartiles]]
            left.barh(names, medians, xerr=errors, color=colours)
        left.set_title(title, fontsize=10)
        left.set_xlabel("seconds of a step (median, quartiles)")
        measured = [run for run in shown if run.name not in floors]
        right.barh([run.name for run in measured], [run.peak / 1e6 for run in measured], color="C7")
        right.barh(
            [run.name for run in measured], [run.saved / 1e6 for run in measured], color="C0"
        )
        right.set_xlabel("MB beyond weights; blue: kept for the backward")
        for axis in (left, right):
            axis.invert_yaxis()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
