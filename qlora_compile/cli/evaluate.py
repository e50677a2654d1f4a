"""The command line's `eval`: loss and perplexity of a file, with and without an adapter."""

from __future__ import annotations

import json as json_format
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.named_values import named_values
from qlora_compile.cli.options import AdapterFormatOption, AdapterModelOption, AdapterOption
from qlora_compile.hf.trainer.sources import check_paths
from qlora_compile.training.figures import held_out_figures
from qlora_compile.training.model_choice import be_quiet
from qlora_compile.training.settings import RunSettings

_OF_THE_MODEL = ("model", "format", "block_size", "dtype", "tune")


def evaluate(
    adapter: AdapterOption,
    data: Annotated[list[Path], typer.Option("--data", help="Files, a folder or a Hub name.")],
    model: AdapterModelOption = None,
    format: AdapterFormatOption = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="The data's own names: prompt=question,…")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Tokens of a row. [as in training]")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="How many rows to take. [all]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Compute loss and perplexity of a file, with the base model alone and with the adapter."""
    with bad_input_in_one_line():
        from qlora_compile.training.adapted import adapter_settings

        check_paths(data)
        trained = adapter_settings(adapter, model, format)
        # The rows of other objectives have other columns, and their trainers other options.
        same = trained.objective == "sft"
        options = {
            name: value
            for name, value in trained.options.items()
            if name == "chat_template_path" or (same and name != "packing")
        }
        settings = RunSettings(
            data=tuple(map(str, data)),
            columns=named_values("--columns", columns) or (trained.columns if same else {}),
            max_length=max_length or trained.max_length,
            held_out=0.0,
            options=options,
            **{name: getattr(trained, name) for name in _OF_THE_MODEL},
        )
        be_quiet()
        figures = _figures(adapter, settings, rows)
    if json:
        typer.echo(json_format.dumps(figures, indent=2))
        return
    Console().print(figures_table(figures))


def figures_table(figures: dict[str, Any]) -> Table:
    """Return a table of the losses of both models."""
    table = Table("", "loss", "perplexity", title=f"{figures['sequences']} rows")
    for name, of in (("base model", "before"), ("with the adapter", "after")):
        error = figures[f"{of}_standard_error"]
        spread = "" if error is None else f" ± {error:.4f}"
        table.add_row(name, f"{figures[of]:.4f}{spread}", f"{figures[f'{of}_perplexity']:.3f}")
    return table


def _figures(adapter: Path, settings: Any, count: int | None) -> dict[str, Any]:
    from qlora_compile.hf.trainer.held_out_loss import row_losses
    from qlora_compile.hf.trainer.token_rows import token_rows
    from qlora_compile.hf.training import quiet
    from qlora_compile.training.adapted import adapted_model
    from qlora_compile.training.run import TrainingRun

    quiet()
    run = TrainingRun(settings)
    *_, tokenizer, rows = run.checked()
    table = token_rows(run, tokenizer, rows)
    table = table.select(range(min(count or len(table), len(table))))
    model, _ = adapted_model(adapter, settings)
    with model.disable_adapter():
        base = row_losses(model, table)
    figures = held_out_figures(base, row_losses(model, table))
    perplexities = {f"{of}_perplexity": math.exp(figures[of]) for of in ("before", "after")}
    return {**figures, **perplexities}
