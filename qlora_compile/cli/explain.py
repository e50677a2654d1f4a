"""The command line's `explain`: reports how every linear layer would be computed."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.options import (
    AlphaOption,
    DropoutOption,
    FormatOption,
    ModelOption,
    RankOption,
    TuneOption,
)
from qlora_compile.errors import OutputDirectoryError
from qlora_compile.outputs import writable_directory, write_whole
from qlora_compile.training.model_choice import quiet_choice

if TYPE_CHECKING:
    from qlora_compile.report import Report


PICTURE_COLUMNS = 88


def explain(
    model: ModelOption,
    format: FormatOption = None,
    rank: RankOption = 16,
    alpha: AlphaOption = None,
    dropout: DropoutOption = 0.0,
    tune: TuneOption = "auto",
    all: Annotated[
        bool, typer.Option("--all", help="A line for every layer, not one for equal ones.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Also draw the table into this file, as an SVG.")
    ] = None,
) -> None:
    """Show for every linear layer how it would be computed, or why it is left alone."""
    with bad_input_in_one_line():
        if svg is not None:
            _check_writable_file(svg)
        choice = quiet_choice(model, format, rank, alpha, dropout, tune)
        config = choice.check()
        from qlora_compile import api

        report = api.explain(choice.optimized(config))
    if json or all:
        typer.echo(report.to_json() if json else str(report))
    else:
        _print(report, Console())
    if svg is not None:
        write_whole(svg, picture(report, f"qlora-compile explain --model {model}"))


def picture(report: Report, title: str) -> str:
    """Return the grouped table and the summary as an SVG, with a title."""
    console = Console(record=True, file=io.StringIO(), width=PICTURE_COLUMNS)
    _print(report, console)
    return console.export_svg(title=title)


def _check_writable_file(file: Path) -> None:
    if file.is_dir():
        problem = {"problem": "this is a directory", "remedy": "name a file"}
        raise OutputDirectoryError(value=str(file), **problem)
    writable_directory(file.parent)


def _print(report: Report, console: Console) -> None:
    console.print(grouped_table(report), *report.summary(), sep="\n", highlight=False)


def grouped_table(report: Report) -> Table:
    """Return a table with one line for sites that are equal except for numbers in their names.

    Where packed weights come from, and why a site is not fused, is in numbered notes below."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for site in report.sites:
        variants = tuple(chosen and chosen.variant for chosen in (site.forward, site.backward))
        shape = f"{site.experts} x {site.n}" if site.experts else f"{site.n}"
        stored = (site.format, site.origin)
        key = (stored, f"{shape} x {site.k}", site.rank, site.fused, variants, site.reason)
        name = site.name.removeprefix("base_model.model.")  # PEFT's
        groups.setdefault((re.sub(r"\d+", "*", name), *key), []).append(name)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("sites", "name", "stored", "N x K", "rank", "computed by"):
        table.add_column(title, overflow="fold")
    notes: dict[str, int] = {}

    def noted(text: str, note: str | None) -> str:
        return text if note is None else f"{text} ({notes.setdefault(note, len(notes) + 1)})"

    for (pattern, stored, shape, rank, fused, variants, reason), names in groups.items():
        name = pattern if len(names) > 1 else names[0]
        cells = (str(len(names)), name, noted(*stored), shape, str(rank))
        forward, backward = variants
        how = forward if forward == backward or not backward else f"{forward}, {backward} back"
        how = how if fused else noted("not fused", reason)
        table.add_row(*cells, Text(how, "green" if fused else "yellow", overflow="fold"))
    table.caption = "\n".join(f"({number}) {note}" for note, number in notes.items())
    table.caption_justify = "left"
    return table
