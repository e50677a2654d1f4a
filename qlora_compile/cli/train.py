"""The command line's `train`: fine-tunes a model and writes all results into one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.options import (
    AlphaOption,
    DropoutOption,
    FormatOption,
    ModelOption,
    RankOption,
    TuneOption,
)
from qlora_compile.outputs import last_checkpoint
from qlora_compile.training.model_choice import quiet_choice

_INTERRUPTED = 130  # a shell's exit status for what SIGINT ended


def train(
    model: ModelOption,
    data: Annotated[
        str, typer.Option("--data", help='A text file, a .jsonl with "text", or: demo.')
    ],
    output: Annotated[Path, typer.Option("--output", help="Directory for everything written.")],
    format: FormatOption = None,
    rank: RankOption = 16,
    alpha: AlphaOption = None,
    dropout: DropoutOption = 0.0,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps in all.")] = 60,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", help="Tokens per sequence.")
    ] = 128,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences per step.")] = 4,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Peak, after a tenth of the steps.")
    ] = 2e-4,
    seed: Annotated[int, typer.Option("--seed", help="For adapters, order and split.")] = 0,
    held_out: Annotated[
        float, typer.Option("--held-out", help="Fraction of the documents held out.")
    ] = 0.1,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", help="Steps between checkpoints.")
    ] = 20,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in --output.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in --output.")
    ] = False,
    tune: TuneOption = "auto",
) -> None:
    """Fine-tune a causal language model; write adapter, loss curve, report and figures."""
    with bad_input_in_one_line(), _interruption_in_one_line(output):
        from qlora_compile.training.run import TrainingRun

        run = TrainingRun(
            choice=quiet_choice(model, format, rank, alpha, dropout, tune),
            data=data,
            output=output,
            steps=steps,
            sequence_length=sequence_length,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            held_out=held_out,
            checkpoint_every=checkpoint_every,
            resume=resume,
            overwrite=overwrite,
        )
        metrics = _execute(run)
    Console().print(closing_table(metrics, output))


@contextlib.contextmanager
def _interruption_in_one_line(output: Path) -> Iterator[None]:
    """Turn Ctrl-C into one line that says what is saved, and an exit.

    Raises:
        typer.Exit: in place of a KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        saved = last_checkpoint(output)
        text = (
            f"{saved} holds adapter and training state; --resume goes on from there"
            if saved
            else "nothing was saved"
        )
        typer.echo(f"stopped: {text}", err=True)
        raise typer.Exit(_INTERRUPTED) from error


def closing_table(metrics: dict[str, Any], output: Path) -> Table:
    """Return a table of the final figures of a run."""
    table = Table(title=f"Results in {output}", show_header=False)
    held_out = metrics["held_out"]
    if held_out:
        table.add_row(
            f"held-out loss, {held_out['sequences']} sequences (± standard error)",
            f"{_with_error(held_out, 'before')} → {_with_error(held_out, 'after')}",
        )
        table.add_row(
            "change on the same sequences (± standard error)",
            _with_error(held_out, "difference", "+.4f"),
        )
    training = metrics["training"]
    speed = training["tokens_per_second_after_first_step"]
    table.add_row(
        "tokens per second, first step left out", "unknown" if speed is None else f"{speed:.0f}"
    )
    table.add_row("first step, compiling included", f"{training['first_step_seconds']:.1f} s")
    memory = metrics["peak_memory"]
    size = memory["bytes"]
    table.add_row(
        f"peak {memory['kind']}, loading included",
        "unknown" if size is None else f"{size / 2**30:.2f} GiB",
    )
    sites = metrics["sites"]
    table.add_row("sites fused", f"{sites['fused']} of {sites['total']}")
    return table


def _with_error(figures: dict[str, Any], name: str, form: str = ".4f") -> str:
    error = figures[f"{name}_standard_error"]
    return f"{figures[name]:{form}} ± {'unknown' if error is None else f'{error:.4f}'}"


def _execute(run: Any) -> dict[str, Any]:
    from qlora_compile.hf.training import StepObserver

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("training", total=run.steps, visible=False)

        def on_step(step: int, total: int, loss: float | None) -> None:
            described = None if loss is None else f"training, loss {loss:.3f}"
            progress.update(task, completed=step, total=total, visible=True, description=described)

        metrics, _ = run.execute(progress.console.print, StepObserver(on_step))
    return metrics
