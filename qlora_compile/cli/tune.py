"""The command line's `tune`: measures what a model or a list of shapes needs, and records it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.errors import BudgetError, DtypeChoiceError
from qlora_compile.cli.options import (
    TRAINED_ROWS,
    DropoutOption,
    FormatOption,
    ModelChoiceOption,
    RankOption,
    RowsOption,
    ShapesOption,
    require_model_or_shapes,
)
from qlora_compile.cli.shapes import parse_shapes
from qlora_compile.text_table import text_table
from qlora_compile.training.model_choice import DEFAULT_FORMAT, check_format, quiet_choice

if TYPE_CHECKING:
    from qlora_compile.kernels.problem import Problem
    from qlora_compile.kernels.selection import Choice
    from qlora_compile.kernels.selector import ModelledSelector

_DTYPES = ("bfloat16", "float16", "float32")


def tune(
    model: ModelChoiceOption = None,
    shapes: ShapesOption = None,
    format: FormatOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Dtype of x. [the model's; with --shapes: bfloat16]"),
    ] = None,
    rank: RankOption = 16,
    dropout: DropoutOption = 0.0,
    rows: RowsOption = None,
    budget: Annotated[str, typer.Option("--budget", help="Time to spend: 120s, 5m.")] = "120s",
    again: Annotated[
        bool, typer.Option("--again", help="Also measure problems with a record.")
    ] = False,
) -> None:
    """Measure the variants of each layer on this machine, and record the fastest."""
    with bad_input_in_one_line():
        require_model_or_shapes(model, shapes)
        if format is not None:
            check_format(format)
        if dtype is not None and dtype not in _DTYPES:
            raise DtypeChoiceError(value=dtype, known=", ".join(_DTYPES))
        seconds = parse_budget(budget)
        listed = None if shapes is None else parse_shapes(shapes)
        import torch

        from qlora_compile.cli.training_problems import COMPUTE_DTYPE, problems_of_shapes

        device = "cuda" if torch.cuda.is_available() else "cpu"
        given = None if dtype is None else getattr(torch, dtype)
        if listed is not None:
            stored = format or DEFAULT_FORMAT
            problems = problems_of_shapes(
                listed, stored, dropout=dropout > 0, device=device, dtype=given or COMPUTE_DTYPE
            )
        else:
            choice = quiet_choice(str(model), format, rank, None, dropout)
            config = choice.check()
            from qlora_compile.cli.model_problems import problems_of_model

            compiled = choice.optimized(config)
            problems = problems_of_model(compiled, rows or [TRAINED_ROWS], given, device)
        _tune(problems, seconds, again=again)


def parse_budget(text: str) -> float:
    """Parse a time such as "120s", "120" or "2m"; return seconds.

    Raises:
        BudgetError: the text is not such a time, or the time is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|)", text.strip())
    seconds = 0.0 if match is None else float(match[1]) * (60 if match[2] == "m" else 1)
    if not seconds:
        raise BudgetError(value=text)
    return seconds


def _tune(problems: list[Problem], budget: float, *, again: bool) -> None:
    from qlora_compile.tuning.cache_folder import cache_folder
    from qlora_compile.tuning.store import RecordStore
    from qlora_compile.tuning.tuner import Tuner

    store = RecordStore(cache_folder())
    tuner = Tuner("tune", store, budget, each=None, again=again)
    columns = (TextColumn("problems"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    choices: dict[Problem, Choice | None] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(problems))

        def on_record(problem: Problem, choice: Choice | None) -> None:
            choices[problem] = choice
            progress.advance(task)

        tuner.ensure(problems, on_record)
    typer.echo("\n".join(closing_table(choices, tuner.selector)))
    known = sum(choice is not None for choice in choices.values()) - tuner.measurements
    missed = len(choices) - known - tuner.measurements
    counts = [f"{tuner.measurements} problems measured, {known} known before"]
    counts += [f"{missed} not measured: give more --budget, or see the warnings"] * bool(missed)
    typer.echo(f"\n{', '.join(counts)}; records in {store.folder}")


def closing_table(
    choices: Mapping[Problem, Choice | None], selector: ModelledSelector
) -> list[str]:
    """Return the lines of a table of what computes each problem from now on.

    selector: knows why problems without a choice are not measured.
    """
    rows = []
    for problem, choice in choices.items():
        measured = choice and choice.measured
        if choice is None or measured is None:
            reason = selector.unmeasured(problem)
            why = "not measured" if reason is None else f"not measured: {reason}"
            rows.append((None, None, None, why, None, str(problem)))
            continue
        rows.append(
            (
                f"{choice.seconds * 1e3:.3f}",
                measured.gain and f"{measured.gain:.2f}",
                measured.margin and f"{measured.margin:.2f}",
                choice.name,
                measured.runner_up,
                str(problem),
            )
        )
    return text_table(("ms", "× dense", "× second", "fastest", "second", "problem"), rows)
