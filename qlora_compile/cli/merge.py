"""The command line's `merge`: writes base and adapter as one model, and measures the distance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.errors import OptionError
from qlora_compile.training.documents import read_documents
from qlora_compile.training.trained_run import trained_run

_DTYPES = ("bfloat16", "float16", "float32")


def merge(
    adapter: Annotated[
        Path, typer.Option("--adapter", help="The adapter's folder, such as train's --output.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Where to write the merged model.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The base model. [the one that train has noted]"),
    ] = None,
    base_format: Annotated[
        str | None,
        typer.Option(
            "--base-format",
            help="The format that the base was trained in. [the one that train has noted]",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help=", ".join(_DTYPES) + ".")] = "bfloat16",
    format: Annotated[
        str | None,
        typer.Option("--format", help="Measure what packing the merged model in it costs."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Text to measure on. [docstrings of Python's]")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Of each file.")] = "5GB",
) -> None:
    """Merge an adapter into the dequantised base that it was trained on, and write plain
    safetensors."""
    with bad_input_in_one_line():
        if dtype not in _DTYPES:
            known = ", ".join(map(repr, _DTYPES))
            raise OptionError(option="--dtype", value=dtype, known=known)
        run = trained_run(adapter, model, base_format)
        texts = None if data is None else [each.text for each in read_documents(data)]
        run.check()
        import torch

        from qlora_compile.kernels.formats.formats import format_written
        from qlora_compile.merging import merge as merge_model

        name, options = (None, {}) if format is None else format_written(format)
        report = merge_model(
            run.model(),
            output,
            getattr(torch, dtype),
            tokenizer=run.tokenizer(),
            texts=texts,
            format=name,
            max_shard_size=max_shard_size,
            **options,
        )
    typer.echo(str(report))
