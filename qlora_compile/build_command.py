"""The command line's `build`: Triton kernels for a GPU that this machine need not have."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qlora_compile.bad_input import bad_input_in_one_line
from qlora_compile.errors import ModelOrShapesError
from qlora_compile.model_choice import check_format, quiet_choice
from qlora_compile.shapes import parse_shapes

if TYPE_CHECKING:
    from qlora_compile.build import BuiltKernel
    from qlora_compile.problem import Problem

_TRAINED_ROWS = 512
"""Those of a step of `qlora-compile train`: four sequences of 128 tokens."""


def build(
    arch: Annotated[str, typer.Option("--arch", help="sm_90, gfx942, …: what to compile for.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the kernels.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model's folder, .gguf file, Hub name, or: demo."),
    ] = None,
    shapes: Annotated[
        str | None, typer.Option("--shapes", help="Instead of a model: MxNxKxR, with commas.")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="How the weights are stored: nf4, fp4, int8, none.")
    ] = "nf4",
    rank: Annotated[int, typer.Option("--rank", help="Rank of a model's adapters.")] = 16,
    dropout: Annotated[float, typer.Option("--dropout", help="Dropout before the adapters.")] = 0.0,
    rows: Annotated[
        list[int] | None,
        typer.Option("--rows", min=1, help="Tokens of a model's step; again for more. [512]"),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", min=1, help="How many ways of computing each layer to build. [5]"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Compile the kernels a GPU will need, on any machine: its first step then compiles none."""
    with bad_input_in_one_line():
        if (model is None) == (shapes is None):
            raise ModelOrShapesError(value="neither" if model is None else "both")
        check_format(format)
        listed = None if shapes is None else parse_shapes(shapes)
        from qlora_compile import build as builder

        builder.check_arch(arch)
        if listed is not None:
            from qlora_compile.training_problems import problems_of_shapes

            problems = problems_of_shapes(listed, format, dropout=dropout > 0)
        else:
            problems = _model_problems(str(model), format, rank, dropout, rows or [_TRAINED_ROWS])
        with _progress() as on_kernel:
            kernels = builder.build(
                problems,
                arch,
                output,
                limit=candidates or builder.HANDFUL,
                jobs=jobs,
                on_kernel=on_kernel,
            )
    Console().print(closing_table(kernels, arch, output))
    typer.echo(
        f"Where the GPU is, with the same Triton and qlora_compile, wherever the folder lies:\n"
        f"export TRITON_CACHE_DIR={output.absolute()}"
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows how many kernels of how many are done, once there are any."""
    columns = (
        TextColumn("kernels"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task("")
    with contextlib.ExitStack() as shown:

        def on_kernel(done: int, total: int) -> None:
            if done == 1:
                shown.enter_context(progress)
            progress.update(task, completed=done, total=total)

        yield on_kernel


def closing_table(kernels: list[BuiltKernel], arch: str, output: Path) -> Table:
    """What was built, by the variants that need it."""
    by_variants: dict[tuple[str, ...], list[BuiltKernel]] = defaultdict(list)
    for kernel in kernels:
        by_variants[tuple(sorted(kernel.variants))].append(kernel)
    table = Table(title=f"Kernels for {arch} in {output}", show_footer=True)
    columns = ("variant", "kernels", "seconds", "size")
    for name, total in zip(columns, ("all", *_figures(kernels)), strict=True):
        table.add_column(name, total, justify="left" if name == "variant" else "right")
    for variants, built in sorted(by_variants.items()):
        table.add_row(" and ".join(variants), *_figures(built))
    return table


def _figures(kernels: list[BuiltKernel]) -> tuple[str, str, str]:
    size = sum(kernel.size for kernel in kernels)
    seconds = sum(kernel.seconds for kernel in kernels)
    return str(len(kernels)), f"{seconds:.1f}", f"{size / 2**20:.1f} MiB"


def _model_problems(
    model: str, format: str, rank: int, dropout: float, rows: list[int]
) -> list[Problem]:
    choice = quiet_choice(model, format, rank, None, dropout)
    config = choice.check()
    from qlora_compile.model_problems import problems_of_model
    from qlora_compile.training_problems import COMPUTE_DTYPE

    return problems_of_model(choice.optimized(config), rows, COMPUTE_DTYPE)
