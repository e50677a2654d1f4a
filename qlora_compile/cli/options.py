"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_compile.cli.errors import ModelOrShapesError

TRAINED_ROWS = 512
"""The rows of a step of `qlora-compile train`: four sequences of 128 tokens."""

ModelOption = Annotated[
    str, typer.Option("--model", help="A model's folder, .gguf file, Hub name, or: demo.")
]
ModelChoiceOption = Annotated[
    str | None, typer.Option("--model", help="A model's folder, .gguf file, Hub name, or: demo.")
]
ShapesOption = Annotated[
    str | None,
    typer.Option("--shapes", help="In place of --model: MxNxKxR, …; N+N for siblings."),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="The format to store weights in, such as nf4 or int4:group_size=128, or: none. "
        "[nf4; a quantised checkpoint stays as it is]",
    ),
]
RankOption = Annotated[int, typer.Option("--rank", help="Rank of the adapters.")]
AlphaOption = Annotated[
    float | None, typer.Option("--alpha", help="Scale of the adapters, times 1/rank. [2 * rank]")
]
DropoutOption = Annotated[float, typer.Option("--dropout", help="Dropout before the adapters.")]
AdapterOption = Annotated[
    Path, typer.Option("--adapter", help="The adapter's folder, a run's --output.")
]
AdapterModelOption = Annotated[
    str | None, typer.Option("--model", help="A base in place of the one it was trained on.")
]
AdapterFormatOption = Annotated[
    str | None, typer.Option("--format", help="A format in place of the one it was trained in.")
]
RowsOption = Annotated[
    list[int] | None,
    typer.Option("--rows", min=1, help="Tokens of a model's step. May be repeated. [512]"),
]
TuneOption = Annotated[
    str,
    typer.Option("--tune", help="What chooses variants: auto, off, model, or a path of records."),
]


def require_model_or_shapes(model: str | None, shapes: str | None) -> None:
    """Raise ModelOrShapesError unless exactly one of the two is given."""
    if (model is None) == (shapes is None):
        raise ModelOrShapesError(value="neither" if model is None else "both")
