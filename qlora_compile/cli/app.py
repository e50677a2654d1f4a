"""The command line's app, with all commands of `qlora-compile`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from qlora_compile import __version__
from qlora_compile.cli.build import build
from qlora_compile.cli.chat import chat
from qlora_compile.cli.evaluate import evaluate
from qlora_compile.cli.explain import explain
from qlora_compile.cli.merge import merge
from qlora_compile.cli.records import records
from qlora_compile.cli.train import train
from qlora_compile.cli.tune import tune
from qlora_compile.cli.verify import verify

COMMANDS = (train, evaluate, chat, merge, explain, verify, tune, records, build)
"""In the order of the help text; a function is one command, a Typer is a group of commands."""

NAMES = {"evaluate": "eval"}
"""Commands that Python has a function of its own for."""

app = typer.Typer(
    help="Fine-tune quantised models with LoRA through a compiler.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # transformers draws a bar of tqdm's own while it decodes a GGUF file.
    os.environ.setdefault("TQDM_DISABLE", "1")


for _command in COMMANDS:
    if isinstance(_command, typer.Typer):
        app.add_typer(_command)
    else:
        app.command(NAMES.get(_command.__name__))(_command)

if __name__ == "__main__":
    app()
