"""Compares qlora_compile with what users would train with instead, in the same run.

Contenders have the same model, data, seed, rank, dtype and batch, each a process of its own, and
take steps in turn. Beside them runs the floor: only the products, attention and head of the step,
on dense weights. Everything runs on the CPU; `make device` is for GPUs. Prints the figures and
writes bench/results/peers.{md,json,png}; settings that did not run keep their results, and so do
other processors. If the losses do not agree, no speed is reported.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bench.measured_on import in_words, measured_on, processor_of
from bench.peers.contenders import CONTENDERS, NEEDS_GPU, OURS, STOCK
from bench.peers.plot import plot
from bench.peers.race import ROOT, Run, race
from bench.peers.settings import DTYPES, SETTINGS, Setting, place, settings_in
from bench.peers.table import section

RESULTS = Path(__file__).parents[1] / "results"


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Contenders; all by default, ours and stock always.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each, the first not timed with them.")] = 9,
    setting: Annotated[
        list[int] | None, typer.Option(help="By number, from 0; all by default.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="A commit to compare ours with as well.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the model: {', '.join(DTYPES)}.")] = DTYPES[0],
    dropout: Annotated[float, typer.Option(help="Of the adapters.", min=0, max=0.9)] = 0.0,
) -> None:
    """Compare step time, memory and losses with the peers'."""
    known = [name for name in CONTENDERS if name not in NEEDS_GPU]
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r}; there are {', '.join(known)}")
    chosen = [each for each in known if not names or each in names]
    chosen = list(dict.fromkeys([OURS, STOCK, *chosen]))
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r}; there are {', '.join(DTYPES)}")
    settings = settings_in(dtype, dropout)
    settings = [settings[number] for number in setting or range(len(SETTINGS))]
    results: list[tuple[Setting, list[Run]]] = []
    worktree = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        root = None
        if base is not None:
            root = Path(folder) / "base"
            subprocess.run([*worktree, "add", "--detach", "--quiet", str(root), base], check=True)
        try:
            for each in settings:
                results.append((each, race(each, chosen, steps, root)))
                typer.echo("\n".join(section(*results[-1])))
        finally:
            if root is not None:
                subprocess.run([*worktree, "remove", "--force", str(root)], check=True)
    if not names and base is None:
        keep(results)


def keep(results: list[tuple[Setting, list[Run]]]) -> None:
    """Write the results, each with the machine and versions, in place of earlier ones of its
    setting on the same processor."""
    file = RESULTS / "peers.json"
    known = json.loads(file.read_text()) if file.exists() else []
    entries = {(processor_of(each), Setting(**each["setting"])): each for each in known}
    for setting, runs in results:
        told = {"setting": asdict(setting), **measured_on(), "runs": [asdict(run) for run in runs]}
        entries[processor_of(told), setting] = told
    ordered = sorted(entries, key=lambda key: (key[0], place(key[1])))
    file.write_text(json.dumps([entries[key] for key in ordered], indent=1) + "\n")
    lines = [
        *("# Beside the peers", ""),
        "By `make bench`: bfloat16, NF4 where not said otherwise, rank 16 on all linears, steps in",
        "turn. Peak and saved: bytes that a step holds at most, and from forward to backward,",
        "beyond weights, adapters and the optimiser's state. Launched: operators that call no",
        "other. Floor: products, attention and head alone, of attention and head the faster of",
        "torch's and ours.",
        "",
    ]
    shown = []
    for kind, setting in ordered:
        entry = entries[kind, setting]
        runs = [Run(**run) for run in entry["runs"]]
        title, *rest = section(setting, runs)
        shown.append((f"{setting}, {kind}", runs))
        steps = max(len(run.seconds) for run in runs)
        lines += [f"{title}, {kind}", "", f"{steps} steps of each; {in_words(entry)}.", *rest]
    file.with_suffix(".md").write_text("\n".join(lines))
    plot(shown, file.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
