"""Tells which of transformers' model types train through qlora_compile as through stock PEFT.

Every causal language model of transformers, and some encoders, sequence-to-sequence, vision and
multimodal models, built at toy size with LoRA on all linears: two training steps each, losses and
all adapter gradients compared, in float32. Prints a summary and writes bench/results/coverage.json
and coverage.md; types that are not named keep the rows of the last run.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

from bench.coverage.compare import EXCLUDED
from bench.coverage.kinds import KINDS, WITHOUT_CACHE
from bench.coverage.row import TRAINS, Row
from bench.coverage.sweep import sweep
from bench.coverage.table import markdown, summary

RESULTS = Path(__file__).parents[1] / "results"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Model types; all by default.")] = None,
    inductor: Annotated[
        bool, typer.Option(help="Compile by Inductor too, not only AOTAutograd.")
    ] = False,
    limit: Annotated[float, typer.Option(help="Seconds for one type.")] = 120.0,
) -> None:
    file = RESULTS / "coverage.json"
    stored = json.loads(file.read_text())["rows"] if names and file.exists() else []
    rows = {row["name"]: Row(**row) for row in stored}
    chosen = names or list(KINDS)
    for index, row in enumerate(sweep(chosen, limit, inductor=inductor)):
        row.family = KINDS[row.name].family
        rows[row.name] = row
        result = row.ours if row.stock == TRAINS else f"stock: {row.stock}"
        print(f"{index + 1}/{len(chosen)} {row.name}: {result} ({row.seconds:.0f} s)", flush=True)
    ordered = [rows[name] for name in KINDS if name in rows]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.mkdir(exist_ok=True)
    contents = {"versions": versions, "rows": [asdict(row) for row in ordered]}
    file.write_text(json.dumps(contents, indent=1) + "\n")
    how = (
        f"By `python -m bench.coverage`, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, CPU, float32, toy sizes, LoRA of rank 4 on all linears (but for "
        f"those of {', '.join(sorted(EXCLUDED))} that stock PEFT cannot adapt), two steps; no "
        f"key-value cache for {', '.join(WITHOUT_CACHE)}, which cannot build their own; "
        f"{'Inductor' if inductor else 'AOTAutograd without Inductor'} behind the rewriting."
    )
    (RESULTS / "coverage.md").write_text(markdown(ordered, how))
    print("\n".join(["", *summary(ordered)]))


if __name__ == "__main__":
    typer.run(main)
