"""The command line's `merge`: writes base and adapter as one model, and measures the distance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.options import AdapterModelOption, AdapterOption
from qlora_compile.errors import OptionError
from qlora_compile.training.model_choice import DEMO, be_quiet, check_format

_DTYPES = ("bfloat16", "float16", "float32")
_MEASURED_TOKENS = 4096


def merge(
    adapter: AdapterOption,
    output: Annotated[Path, typer.Option("--output", help="Where to write the merged model.")],
    model: AdapterModelOption = None,
    base_format: Annotated[
        str | None,
        typer.Option("--base-format", help="A format in place of the one it was trained in."),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="The weights': bfloat16, float16 or float32.")
    ] = _DTYPES[0],
    format: Annotated[
        str | None,
        typer.Option("--format", help="Measure what packing the result in it would cost."),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="A file or folder of text to measure on, or: demo.")
    ] = DEMO,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Of each file.")] = "5GB",
) -> None:
    """Merge an adapter into the dequantised base that it was trained on; write plain safetensors
    and measure how far they are from the trained model."""
    with bad_input_in_one_line():
        if dtype not in _DTYPES:
            known = ", ".join(map(repr, _DTYPES))
            raise OptionError(option="--dtype", value=dtype, known=known)
        if format is not None:
            check_format(format)
        from qlora_compile.training.adapted import adapted_model, adapter_settings

        settings = adapter_settings(adapter, model, base_format)
        be_quiet()
        import torch

        from qlora_compile.hf.merging.write import origin_of_run
        from qlora_compile.hf.trainer.preparation import texts
        from qlora_compile.kernels.formats.formats import format_written
        from qlora_compile.merging import merge as merge_model

        trained, tokenizer = adapted_model(adapter, settings)
        packing: dict[str, Any] = {}
        if format is not None:
            name, options = format_written(format)
            packing = {"format": name, **options}
        report = merge_model(
            trained,
            output,
            getattr(torch, dtype),
            tokenizer=tokenizer,
            texts=None if data == DEMO else texts(Path(data), tokenizer, _MEASURED_TOKENS),
            max_shard_size=max_shard_size,
            origin=origin_of_run(adapter, output, model=model, format=base_format),
            **packing,
        )
    typer.echo(str(report))
