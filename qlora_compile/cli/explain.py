"""The command line's `explain`: reports how every linear layer would be computed."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.options import (
    AlphaOption,
    DropoutOption,
    FormatOption,
    ModelOption,
    RankOption,
    TuneOption,
)
from qlora_compile.training.model_choice import quiet_choice


def explain(
    model: ModelOption,
    format: FormatOption = None,
    rank: RankOption = 16,
    alpha: AlphaOption = None,
    dropout: DropoutOption = 0.0,
    tune: TuneOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show for every linear layer how it would be computed, or why it is left alone."""
    with bad_input_in_one_line():
        choice = quiet_choice(model, format, rank, alpha, dropout, tune)
        config = choice.check()
        from qlora_compile import api

        report = api.explain(choice.optimized(config))
    typer.echo(report.to_json() if json else str(report))
