"""Measures ours, stock and Unsloth on this machine's GPU, the most valuable parts first, in a
budget.

Prints a section for each part as it ends and all of them at the end, and merges the results into
bench/results/device.{md,json}. If the losses do not agree, no speed is reported.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.device.begun import BEGUN
from bench.device.parts import PARTS, toy
from bench.device.report import failures, headline, told
from bench.device.results import RESULTS, keep, where

MARGIN = 6.0
"""Seconds for ending processes and for writing."""

LEAST = 10.0
"""With fewer seconds left, no part is begun."""


def command(
    seconds: Annotated[float, typer.Option(help="Everything has ended by then.")] = 540.0,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry",
            help="On the CPU, at toy size, untimed; fails if any part does, keeps nothing.",
        ),
    ] = False,
    commit: Annotated[
        str | None, typer.Option(help="The commit that is measured, without git.")
    ] = None,
    results: Annotated[Path, typer.Option(help="The folder of device.{md,json}.")] = RESULTS,
    merge: Annotated[
        Path | None, typer.Option(help="Measure nothing: add the results in this device.json.")
    ] = None,
) -> None:
    """Measure on a GPU for at most so many seconds."""
    if merge is not None:
        for record in json.loads(merge.read_text()):
            keep(record, results)
        return
    if not dry and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU; --dry runs all but the timing on a CPU")
    if dry:
        # Toy matrices are multiplied faster than threads are woken.
        os.environ["OMP_NUM_THREADS"] = "1"
    until = BEGUN + seconds - MARGIN
    record = where(commit)
    shown: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in dict.fromkeys(map(toy, PARTS)) if dry else PARTS:
            left = until - time.monotonic()
            if left < LEAST:
                shown[part.title] = {"kind": "left out", "why": "not begun: out of time"}
                continue
            found = part.run(time.monotonic() + part.limit(left), Path(folder))
            shown[part.title] = found
            typer.echo("\n".join(told(part.title, found)))
            if not dry:
                keep({**record, "parts": {part.title: found}}, results)
    typer.echo(f"# {headline(record)}\n")
    for title, found in shown.items():
        typer.echo("\n".join(told(title, found)))
    wrong = [f"{title}: {each}" for title, found in shown.items() for each in failures(found)]
    if dry and wrong:
        typer.echo("\n".join(["The dry run failed:", *wrong]), err=True)
        raise typer.Exit(1)


def main() -> None:
    typer.run(command)
