"""Measures all of the CPU's candidates, to see how well the cost model ranks them.

Writes the medians and the CPU's figures to bench/results/ranking.json; a test ranks them again and
requires that the fastest is among the model's first three. Takes some minutes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from qlora_compile.kernels.device_model import CpuModel
from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.selection import candidates
from qlora_compile.tuning.cpu_figures import measure_cpu
from qlora_compile.tuning.measure import measure
from qlora_compile.tuning.record import DTYPES

RESULTS = Path(__file__).parents[1] / "results" / "ranking.json"
LOOKED_AT = 3

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048), (5632, 2048))
"""[N, K] of SmolLM2-135M and of a model of a billion parameters."""


def problem_set() -> Iterator[Problem]:
    """Yield 96 problems: both directions, few and many rows, float32 and bfloat16, with and without
    dropout."""
    directions: tuple[Direction, ...] = ("forward", "backward")
    axes = (directions, (64, 1024), SHAPES, ("float32", "bfloat16"), (False, True))
    for direction, m, (n, k), dtype, dropout in itertools.product(*axes):
        yield Problem(
            direction=direction,
            m=m,
            layout=FORMATS[0].usual_layout((n, k)),
            rank=16,
            x_dtype=DTYPES[dtype],
            compute_dtype=DTYPES[dtype],
            lora_dtype=torch.float32,
            out_dtype=DTYPES[dtype],
            bias=False,
            dropout=dropout,
            keeps_low_rank=True,
            device="cpu",
        )


@dataclass(frozen=True)
class Ranked:
    """The model's ranking of a problem. position: the place of the fastest in the model's order.
    regret: how many times as long as the fastest the best of the model's first three takes."""

    problem: str
    position: int
    regret: float


def ranked(problem: Problem, cpu: CpuModel, seconds: Mapping[str, float]) -> Ranked:
    """Return how the model ranks the candidates with the measured `seconds`."""
    order = [choice.name for choice in candidates(problem, cpu) if choice.name in seconds]
    fastest = min(seconds, key=lambda name: seconds[name])
    best = min(seconds[name] for name in order[:LOOKED_AT])
    return Ranked(str(problem), order.index(fastest), best / seconds[fastest])


def main(
    seconds: Annotated[float, typer.Option(help="Of timing each problem.")] = 0.8,
) -> None:
    """Measure all candidates of the problem set."""
    cpu, measured = measure_cpu(), {}
    for problem in track(list(problem_set()), "problems"):
        choices = candidates(problem, cpu)
        result = measure(problem, choices, seconds)
        measured[str(problem)] = {choices[i].name: result.median(i) for i in result.ranking}
    rows = [ranked(p, cpu, measured[str(p)]) for p in problem_set()]
    hits = sum(row.position < LOOKED_AT for row in rows)
    for row in rows:
        if row.position >= LOOKED_AT:
            typer.echo(f"missed, by {row.regret - 1:.1%}: {row.problem}")
    typer.echo(
        f"the fastest is among the first {LOOKED_AT} of {len(rows)} problems' candidates for "
        f"{hits / len(rows):.0%}; measuring just these costs {max(r.regret for r in rows) - 1:.1%} "
        "at most"
    )
    figures = {"threads": torch.get_num_threads(), "cpu": asdict(cpu), "seconds": measured}
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
