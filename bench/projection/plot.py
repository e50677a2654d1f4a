"""The projection as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from bench.projection.report import CARDS, Row
from bench.projection.seconds import Seconds
from bench.projection.shapes import MODELS

COLORS = (
    *("#4477aa", "#ee6677", "#ccbb44", "#66ccee"),
    *("#bbbbbb", "#777777", "#aa3377", "#228833"),
)


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel for each model and card, a bar for each side. rows: of one number of tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(MODELS), len(CARDS), sharex=True)
    for axes, row in zip(panels.flat, rows, strict=True):
        labels = [name.replace(", ", ",\n").replace(" adapters", "") for name in row.sides]
        bottom = [0.0] * len(labels)
        for field, color in zip(fields(Seconds), COLORS, strict=True):
            heights = [1e3 * getattr(side, field.name) for side in row.sides.values()]
            axes.bar(labels, heights, bottom=bottom, color=color, label=field.name)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set_title(f"{row.step.model.name}, {row.device.name}", fontsize=10)
        axes.tick_params(axis="x", labelsize=7)
    for axes in panels[:, 0]:
        axes.set_ylabel("modelled ms")
    step = rows[0].step
    figure.suptitle(
        f"Modelled, not measured: one training step of {step.batch} x {step.length} tokens"
    )
    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=90, metadata={"Software": None})
