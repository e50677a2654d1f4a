"""The command line's `train`: fine-tunes a model and writes all results into one folder."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.named_values import named_values
from qlora_compile.cli.processes import (
    end_by_signal,
    is_one_of_several,
    start_processes,
    what_is_saved,
)
from qlora_compile.training.model_choice import be_quiet
from qlora_compile.training.settings import settings_from

DATA, ADAPTERS, STEPS, CHECKS = "Data", "Model and adapters", "Training", "Evaluation and output"


def _option(name: str, help: str, panel: str) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel)


def train(
    model: Annotated[
        str | None, _option("--model", "A folder, .gguf file, Hub name, or: demo.", ADAPTERS)
    ] = None,
    data: Annotated[
        list[str] | None,
        _option("--data", "A file, a folder, a Hub name, or: demo. May be repeated.", DATA),
    ] = None,
    columns: Annotated[
        str | None, _option("--columns", "The data's own names: prompt=question,…", DATA)
    ] = None,
    objective: Annotated[
        str | None,
        _option("--objective", "sft, dpo, kto, orpo, grpo, reward, classification.", DATA),
    ] = None,
    reward: Annotated[
        str | None, _option("--reward", "For grpo: FILE.py:FUNCTION or MODULE:FUNCTION.", DATA)
    ] = None,
    max_length: Annotated[
        int | None, _option("--max-length", "Tokens of a row or of packed rows. [1024]", DATA)
    ] = None,
    packing: Annotated[
        bool | None, _option("--packing/--no-packing", "Pack several rows into one.", DATA)
    ] = None,
    preview: Annotated[int, _option("--preview", "Show so many rows, without training.", DATA)] = 0,
    format: Annotated[
        str | None,
        _option("--format", "Store weights in: nf4, int4:group_size=128, …", ADAPTERS),
    ] = None,
    block_size: Annotated[
        int | None, _option("--block-size", "Weights that share a scale. [64]", ADAPTERS)
    ] = None,
    dtype: Annotated[
        str | None, _option("--dtype", "auto, bfloat16, float16 or float32.", ADAPTERS)
    ] = None,
    rank: Annotated[int | None, _option("--rank", "Rank of the adapters. [16]", ADAPTERS)] = None,
    alpha: Annotated[
        float | None, _option("--alpha", "Scale of adapters, times 1/rank. [2 * rank]", ADAPTERS)
    ] = None,
    dropout: Annotated[
        float | None, _option("--dropout", "Dropout before the adapters. [0]", ADAPTERS)
    ] = None,
    targets: Annotated[
        str | None, _option("--targets", "Linears to adapt: q_proj,v_proj. [all-linear]", ADAPTERS)
    ] = None,
    dora: Annotated[bool | None, _option("--dora", "Weight-decomposed adapters.", ADAPTERS)] = None,
    rslora: Annotated[
        bool | None, _option("--rslora", "Scale by 1/sqrt(rank) in place of 1/rank.", ADAPTERS)
    ] = None,
    rank_pattern: Annotated[
        str | None, _option("--rank-pattern", "Other ranks, by name: q_proj=32,…", ADAPTERS)
    ] = None,
    tune: Annotated[
        str | None, _option("--tune", "What chooses variants: auto, off, model, a path.", ADAPTERS)
    ] = None,
    logits_free_loss: Annotated[
        bool | None,
        _option("--logits-free-loss", "For trainers without a chunked loss.", ADAPTERS),
    ] = None,
    epochs: Annotated[float | None, _option("--epochs", "Passes over the data. [1]", STEPS)] = None,
    steps: Annotated[
        int | None, _option("--steps", "Optimiser steps, in place of epochs.", STEPS)
    ] = None,
    batch_size: Annotated[int | None, _option("--batch-size", "Rows at once. [4]", STEPS)] = None,
    accumulation: Annotated[
        int | None, _option("--accumulation", "Batches per optimiser step. [1]", STEPS)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, _option("--gradient-checkpointing", "Less memory, more time.", STEPS)
    ] = None,
    learning_rate: Annotated[
        float | None, _option("--learning-rate", "Peak. [2e-4; the trainer's for dpo, …]", STEPS)
    ] = None,
    scheduler: Annotated[
        str | None, _option("--scheduler", "linear, cosine, constant, … [linear]", STEPS)
    ] = None,
    warmup: Annotated[
        float | None, _option("--warmup", "Steps, or a part of all if below 1. [0.1]", STEPS)
    ] = None,
    weight_decay: Annotated[
        float | None, _option("--weight-decay", "The optimiser's weight decay. [0]", STEPS)
    ] = None,
    optimizer: Annotated[
        str | None,
        _option("--optimizer", "adamw_torch, adamw_8bit, paged_adamw_8bit, lion_32bit, …", STEPS),
    ] = None,
    seed: Annotated[
        int | None, _option("--seed", "Seeds adapters, order and split. [0]", STEPS)
    ] = None,
    on_nan: Annotated[
        str | None,
        _option("--on-nan", "stop at a NaN loss or gradient, or skip the batch. [stop]", STEPS),
    ] = None,
    held_out: Annotated[
        float | None, _option("--held-out", "Part of the rows held out, at most 64. [0.1]", CHECKS)
    ] = None,
    eval_every: Annotated[
        int | None, _option("--eval-every", "Steps between evaluations.", CHECKS)
    ] = None,
    best_checkpoint: Annotated[
        bool | None, _option("--best-checkpoint", "Keep the one of lowest evaluation loss.", CHECKS)
    ] = None,
    early_stopping: Annotated[
        int | None, _option("--early-stopping", "Stop after so many no better evaluations.", CHECKS)
    ] = None,
    checkpoint_every: Annotated[
        int | None, _option("--checkpoint-every", "Steps between checkpoints. [100]", CHECKS)
    ] = None,
    report_to: Annotated[
        str | None, _option("--report-to", "wandb, tensorboard, … [none]", CHECKS)
    ] = None,
    output: Annotated[
        str | None, _option("--output", "Folder for all results. [qlora-output]", CHECKS)
    ] = None,
    resume: Annotated[
        bool, _option("--resume", "Go on from the last checkpoint in --output.", CHECKS)
    ] = False,
    overwrite: Annotated[
        bool, _option("--overwrite", "Replace an earlier run in --output.", CHECKS)
    ] = False,
    config: Annotated[
        Path | None, _option("--config", "A file of settings, such as a run's run.yaml.", CHECKS)
    ] = None,
    processes: Annotated[
        int | None, _option("--processes", "How many processes train, one per GPU. [1]", STEPS)
    ] = None,
    set: Annotated[
        list[str] | None,
        _option("--set", "NAME=VALUE for the trainer. May be repeated.", STEPS),
    ] = None,
) -> None:
    """Fine-tune a model on chats, completions or text; write adapter, loss curve, report and
    figures."""
    given = dict(locals())
    for name in ("preview", "resume", "overwrite", "config", "set"):
        del given[name]
    if several := is_one_of_several():
        end_by_signal()  # before the imports, of which a KeyboardInterrupt would show the lines
    with bad_input_in_one_line():
        given["columns"] = named_values("--columns", columns)
        given["rank_pattern"] = named_values("--rank-pattern", rank_pattern)
        given["options"] = named_values("--set", set) or {}
        given["data"] = data and tuple(data)
        given["targets"] = targets and tuple(targets.split(","))
        settings = settings_from(given, config)
        from qlora_compile.training.run import TrainingRun

        run = TrainingRun(settings, resume=resume, overwrite=overwrite)
        run.check_quickly(writes=not preview)
        if not several and settings.processes > 1 and not preview:
            start_processes(settings, resume=resume, overwrite=overwrite)
        be_quiet()
        if preview:
            from qlora_compile.cli.preview import show

            show(run, preview)
            return
        with _interruption_in_one_line(run.output):
            metrics = _execute(run)
    console = Console()
    console.print(closing_table(metrics, run.output))
    for name, text in metrics.get("answers", {}).items():
        console.print(f"[bold]{name}[/bold]")
        console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def _interruption_in_one_line(output: Path) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one line that says what is saved, and an exit.

    Raises:
        typer.Exit: in place of a KeyboardInterrupt, with a shell's status for the signal.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo(f"stopped: {what_is_saved(output)}", err=True)
        raise typer.Exit(128 + getattr(error, "signal", signal.SIGINT)) from error


def closing_table(metrics: dict[str, Any], output: Path) -> Table:
    """Return a table of the final figures of a run."""
    table = Table(title=f"Results in {output}", show_header=False)
    held_out = metrics["held_out"]
    if held_out:
        table.add_row(
            f"held-out loss ± standard error, rows: {held_out['sequences']}",
            f"{_with_error(held_out, 'before')} → {_with_error(held_out, 'after')}",
        )
        table.add_row(
            "change on the same rows ± standard error",
            _with_error(held_out, "difference", "+.4f"),
        )
    training = metrics["training"]
    speed = training["tokens_per_second_after_first_step"]
    table.add_row("tokens per second after the first step", _or_unknown(speed, ".0f"))
    first = _or_unknown(training["first_step_seconds"], ".1f")
    table.add_row("seconds of the first step, compiling included", first)
    memory = metrics["peak_memory"]
    size = memory["bytes"]
    table.add_row(
        f"peak {memory['kind']}, loading included",
        "unknown" if size is None else f"{size / 2**30:.2f} GiB",
    )
    sites = metrics["sites"]
    table.add_row("sites fused", f"{sites['fused']} of {sites['total']}")
    return table


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else f"{value:{form}}"


def _with_error(figures: dict[str, Any], name: str, form: str = ".4f") -> str:
    error = _or_unknown(figures[f"{name}_standard_error"], ".4f")
    return f"{figures[name]:{form}} ± {error}"


def _execute(run: Any) -> dict[str, Any]:
    from qlora_compile.hf.training import StepObserver, quiet

    quiet()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("training", total=None, visible=False)

        def on_step(step: int, total: int, loss: float | None) -> None:
            described = None if loss is None else f"training, loss {loss:.3f}"
            progress.update(task, completed=step, total=total, visible=True, description=described)

        metrics, _ = run.execute(progress.console.print, StepObserver(on_step))
    return metrics
