"""The ahead-of-time gate: compiles every shipped launch for every target, reads and judges
binaries.

It needs no device, and exits with 1 if a gate is not met.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tqdm import tqdm

from bench.static.gates import Result, evaluate
from bench.static.report import describe, markdown
from bench.static.shipped import measure_all
from qlora_compile.errors import InterpretedKernelError
from qlora_compile.kernels.gpu.ahead_of_time import TARGETS
from qlora_compile.tuning.load import usable_cpus

RESULTS = Path(__file__).parents[1] / "results"


def main(
    arch: Annotated[
        list[str] | None, typer.Option(help="a target such as sm_90; again for more")
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="a kernel such as dequantize; again for more")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = len(usable_cpus()),
) -> None:
    """Write bench/results/static.md; if only a part is asked for, print its figures instead."""
    archs = arch or list(TARGETS)
    unknown = [name for name in archs if name not in TARGETS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(TARGETS)}", param_hint="arch")
    try:
        count, rows = measure_all(archs, kernel, jobs)
    except InterpretedKernelError as error:
        raise typer.BadParameter(str(error)) from error
    if not count:
        raise typer.BadParameter(f"no shipped launch of {kernel} for {archs}", param_hint="kernel")
    done = list(tqdm(rows, total=count, unit="launch"))
    results = evaluate(done, archs, kernel)
    if arch or kernel:
        for row in done:
            print(
                row.arch, row.name, "\n   ", describe(row.figures, row.arch) if row.figures else ""
            )
    else:
        (RESULTS / "static.md").write_text(markdown(done, results))
    raise typer.Exit(1 if _print(results, whole=not (arch or kernel)) else 0)


def _print(results: list[Result], *, whole: bool) -> int:
    """Print every gate that is not met, and return their number."""
    console = Console(soft_wrap=True)
    failed = [result for result in results if not result.passed]
    for result in failed:
        for launch, problem in (result.problems or {"": "no launch"}).items():
            console.print(
                f"NOT MET {result.arch} {result.gate}: {problem} {launch}",
                markup=False,
                highlight=False,
            )
    written = f"; see {RESULTS.name}/static.md" if whole else ""
    console.print(f"{len(results) - len(failed)} gates met, {len(failed)} not met{written}")
    return len(failed)


if __name__ == "__main__":
    typer.run(main)
