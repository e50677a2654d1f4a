"""The command line's `build`: compiles Triton kernels for a GPU that this machine may lack."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qlora_compile.cli.bad_input import bad_input_in_one_line
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
from qlora_compile.training.model_choice import DEFAULT_FORMAT, check_format, quiet_choice

if TYPE_CHECKING:
    from qlora_compile.build import BuiltKernel
    from qlora_compile.kernels.problem import Problem


def build(
    arch: Annotated[str, typer.Option("--arch", help="The GPU to compile for: sm_90, gfx942, …")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the kernels.")],
    model: ModelChoiceOption = None,
    shapes: ShapesOption = None,
    format: FormatOption = None,
    rank: RankOption = 16,
    dropout: DropoutOption = 0.0,
    rows: RowsOption = None,
    candidates: Annotated[
        int | None,
        typer.Option("--candidates", min=1, help="How many variants of each layer to build. [5]"),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Processes. [one for each usable CPU]"),
    ] = None,
) -> None:
    """Compile the kernels that a GPU will need, on any machine, so that its first step compiles
    none."""
    with bad_input_in_one_line():
        require_model_or_shapes(model, shapes)
        if format is not None:
            check_format(format)
        listed = None if shapes is None else parse_shapes(shapes)
        from qlora_compile import build as builder
        from qlora_compile.tuning.load import usable_cpus

        builder.check_arch(arch)
        if listed is not None:
            from qlora_compile.cli.training_problems import problems_of_shapes

            stored = format or DEFAULT_FORMAT
            problems = problems_of_shapes(listed, stored, dropout=dropout > 0)
        else:
            problems = _model_problems(str(model), format, rank, dropout, rows or [TRAINED_ROWS])
        with _progress() as on_kernel:
            kernels = builder.build(
                problems,
                arch,
                output,
                limit=candidates or builder.HANDFUL,
                jobs=jobs or len(usable_cpus()),
                on_kernel=on_kernel,
            )
    Console().print(closing_table(kernels, arch, output))
    typer.echo(
        f"On the GPU's machine, with the same Triton and qlora_compile (the folder may be moved):\n"
        f"export TRITON_CACHE_DIR={output.absolute()}"
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar from the first kernel on; yields on_kernel(done, total)."""
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
    """Return a table of what was built, grouped by the variants that need the kernels."""
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
    model: str, format: str | None, rank: int, dropout: float, rows: list[int]
) -> list[Problem]:
    choice = quiet_choice(model, format, rank, None, dropout)
    config = choice.check()
    from qlora_compile.cli.model_problems import problems_of_model
    from qlora_compile.cli.training_problems import COMPUTE_DTYPE

    return problems_of_model(choice.optimized(config), rows, COMPUTE_DTYPE)
