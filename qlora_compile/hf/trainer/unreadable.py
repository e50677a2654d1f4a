"""Why a file of rows could not be read: the row at fault, found after reading has failed."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from pathlib import Path
from typing import Any

from qlora_compile.data_errors import DataSourceError
from qlora_compile.errors import QloraCompileError
from qlora_compile.json_text import parsed_json

DAMAGED = (OSError, ValueError, EOFError, zlib.error)
"""What reading a damaged file raises; the last two if it is compressed."""

_SHOWN = 60  # characters of a line


def unreadable(path: Path, error: BaseException) -> QloraCompileError:
    """Return the error to raise in place of `error`, which reading the file has raised."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UnicodeDecodeError):
        position = _undecodable(path)
        found = "it" if position is None else f"byte {position}"
        problem, remedy = f"{found} is not UTF-8", "convert the file to UTF-8"
    elif isinstance(cause, PermissionError):
        problem, remedy = "permission denied", "check the file's permissions"
    elif "no data" in str(cause):
        problem, remedy = "it has no rows", "pass a file that has"
    else:
        problem = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        remedy = "repair the file"
        if ".json" in path.name.lower():
            problem, remedy = _json_fault(path) or (problem, remedy)
    return DataSourceError(value=str(path), problem=problem, remedy=remedy)


def _undecodable(path: Path) -> int | None:
    """Return the position of the first byte that is not UTF-8, None without one.

    That of the error is in what the reader has decoded: a file, a part of it or a cell.
    """
    position = 0
    if path.is_file():
        with contextlib.suppress(*DAMAGED), _opened(path, "rb") as lines:
            for line in lines:
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    return position + error.start
                position += len(line)
    return None


def _opened(path: Path, mode: str, **options: Any) -> Any:
    return (gzip.open if path.suffix == ".gz" else open)(path, mode, **options)


def _json_fault(path: Path) -> tuple[str, str] | None:
    """Return problem and remedy of the first line that is not a JSON object, None without one."""
    with (
        contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile),  # the error is of the file
        _opened(path, "rt", encoding="utf-8", errors="replace", newline="\n") as lines,
    ):
        for number, line in enumerate(lines, start=1):
            try:
                fine = not line.strip() or isinstance(parsed_json(line), dict)
            except ValueError as error:
                problem = f"row {number} is not JSON ({getattr(error, 'msg', error)})"
            else:
                if fine:
                    continue
                problem = f"row {number} is not a JSON object"
            shown = line.strip()[:_SHOWN]
            return f"{problem}: {shown!r}", "write one JSON object per line, or a list of objects"
    return None
