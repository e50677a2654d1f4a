"""The command line's `verify`: checks every graph in one training step on real text, or checks a
trained adapter and a merged model."""

from __future__ import annotations

import functools
import json as json_format
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.errors import MissingOptionError
from qlora_compile.cli.options import (
    AlphaOption,
    DropoutOption,
    FormatOption,
    ModelChoiceOption,
    RankOption,
    TuneOption,
)
from qlora_compile.hf.trainer.sources import check_paths
from qlora_compile.text_table import text_table
from qlora_compile.training.demo import docstring_documents
from qlora_compile.training.documents import Document
from qlora_compile.training.model_choice import DEMO, ModelChoice, be_quiet, quiet_choice

if TYPE_CHECKING:
    from qlora_compile.report import Report
    from qlora_compile.verify.stages import Stage


def verify(
    model: ModelChoiceOption = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Check a trained adapter, a run's --output.")
    ] = None,
    merged: Annotated[Path | None, typer.Option("--merged", help="Check a merged model.")] = None,
    packed: Annotated[Path | None, typer.Option("--packed", help="Check a packed model.")] = None,
    data: Annotated[
        str, typer.Option("--data", help="A file or folder of text or chats, or: demo.")
    ] = DEMO,
    format: FormatOption = None,
    rank: RankOption = 16,
    alpha: AlphaOption = None,
    dropout: DropoutOption = 0.0,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Tokens per sequence.")
    ] = 128,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences.")] = 4,
    tune: TuneOption = "auto",
    logits_free_loss: Annotated[
        bool,
        typer.Option("--logits-free-loss", help="Also check the loss without logits."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the certificates as JSON.")] = False,
) -> None:
    """Check outputs and gradients of every compiled block against float64; exit with 1 if one is
    wrong. With --adapter, --packed or --merged, check the logits of these folders."""
    with bad_input_in_one_line():
        if data != DEMO:
            check_paths(Path(data))
        sequences = functools.partial(
            _sequences, data=data, length=sequence_length, count=batch_size
        )
        if adapter or packed or merged:
            stages = _stages(adapter, packed, merged, model, format, sequences)
            _tell(stages, json)
            raise typer.Exit(0 if all(stage.passes for stage in stages) else 1)
        if model is None:
            raise MissingOptionError(option="--model")
        choice = quiet_choice(model, format, rank, alpha, dropout, tune)
        choice = replace(choice, logits_free_loss=logits_free_loss)
        report = _checked(choice, sequences)
    verified = bool(report.certificates) and not report.mismatches
    if json:
        results = {name: report.to_dict()[name] for name in ("certificates", "mismatches")}
        typer.echo(json_format.dumps({"verified": verified, **results}, indent=2))
    else:
        typer.echo("\n".join(closing_table(report)))
    raise typer.Exit(0 if verified else 1)


def _stages(
    adapter: Path | None,
    packed: Path | None,
    merged: Path | None,
    model: str | None,
    format: str | None,
    sequences: Callable[..., list[list[int]]],
) -> list[Stage]:
    """Return the stages of the given folders, at least one."""
    from qlora_compile.training.adapted import (
        adapted_model,
        adapter_settings,
        merged_from,
        packed_model,
    )

    if adapter is None and merged is not None:
        adapter, was_model, was_format = merged_from(merged)
        model, format = model or was_model, format or was_format
    settings = None if adapter is None else adapter_settings(adapter, model, format)
    be_quiet()
    from qlora_compile.verify.stages import check_stages

    stages: dict[str, Any]
    if adapter is None or settings is None:
        assert packed is not None
        trained, tokenizer, within = packed_model(packed, model)
        shown, stages = str(packed), {"name": "packed", "adapter": within}
    else:
        trained, tokenizer = adapted_model(adapter, settings)
        shown = settings.model
        stages = {"adapter": adapter, "packed": packed, "merged": merged}
    named = {"tokenizer": tokenizer, "config": trained.config, "model": shown}
    return check_stages(trained, sequences(**named), **stages)


def _tell(stages: list[Stage], json: bool) -> None:
    if json:
        verified = all(stage.passes for stage in stages)
        told = {"verified": verified, "stages": [stage.to_dict() for stage in stages]}
        typer.echo(json_format.dumps(told, indent=2))
        return
    rows = [
        (s.name, f"{s.ratio:.2f}", f"{s.error:.1e}", f"{s.plain_error:.1e}", f"{s.allowed:.1e}")
        for s in stages
    ]
    typer.echo("\n".join(text_table(("stage", "ratio", "error", "plain", "allowed"), rows)))
    for stage in stages:
        if not stage.passes:
            typer.echo(f"mismatch in {stage.name}: the logits are not those of base and adapter")


def _checked(choice: ModelChoice, sequences: Callable[..., list[list[int]]]) -> Report:
    config = choice.check()
    import torch

    from qlora_compile import api
    from qlora_compile.hf import loading

    tokenizer = loading.load_tokenizer(choice.source)
    tokens = sequences(tokenizer=tokenizer, config=config, model=choice.model)
    torch.manual_seed(0)  # for the adapters' initial weights
    device = loading.compute_device()
    model: Any = choice.optimized(config, verify=True).to(device).train()
    ids = torch.tensor(tokens, device=device)
    model(input_ids=ids, labels=ids).loss.backward()
    return api.explain(model)


def _sequences(
    *, tokenizer: Any, config: Any, data: str, length: int, count: int, model: str
) -> list[list[int]]:
    """Return so many sequences of real text."""
    from qlora_compile.hf.trainer.preparation import texts
    from qlora_compile.training.token_sequences import check_sequence_length, token_sequences

    check_sequence_length(length, config, model)
    if data == DEMO:
        documents = docstring_documents()
    else:
        documents = [Document(data, text) for text in texts(Path(data), tokenizer, count * length)]
    named = {"data": data, "purpose": "verifying"}
    return token_sequences(documents, tokenizer, config, length, **named)[:count]


def closing_table(report: Report) -> list[str]:
    """Return a table of the worst comparison by graph and kind of inputs, and all mismatches."""
    rows = []
    for certificate in report.certificates:
        for inputs in certificate.inputs:
            worst = certificate.worst_on(inputs)
            ratio = "unknown" if worst.ratio is None else f"{worst.ratio:.2f}"
            numbers = (f"{x:.1e}" for x in (worst.error, worst.plain_error, worst.allowed))
            rows.append((certificate.region, inputs, ratio, *numbers, worst.tensor))
    header = ("block", "inputs", "ratio", "error", "plain", "allowed", "worst")
    count = len(report.certificates)
    summary = [f"{count} graphs verified, {report.fused} of {len(report.sites)} linears fused"]
    summary += [f"mismatch in {problem}" for problem in report.mismatches]
    return [*(text_table(header, rows) if rows else ()), "", *summary]
