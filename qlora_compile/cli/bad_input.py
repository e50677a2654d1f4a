"""Bad input: the command line answers with one line on stderr, without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from qlora_compile.cli.processes import is_one_of_several, record_error
from qlora_compile.errors import QloraCompileError

_BAD_INPUT = 2  # click's own exit status for a bad option


@contextlib.contextmanager
def bad_input_in_one_line() -> Iterator[None]:
    """Turn an error of this package into one line and an exit; any other error is a bug and passes.

    Of several processes, the one that started them prints the line.

    Raises:
        typer.Exit: in place of a QloraCompileError.
    """
    try:
        yield
    except QloraCompileError as error:
        if is_one_of_several():
            record_error(error)
            raise typer.Exit(_BAD_INPUT) from error
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(_BAD_INPUT) from error
