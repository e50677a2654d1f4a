"""RecordWarning: what stores warn of when they go on without a line, a file or a folder."""

from __future__ import annotations

import warnings
from pathlib import Path

_SAID: set[tuple[object, ...]] = set()


class RecordWarning(UserWarning):
    """A record could not be read or kept; tuning goes on without it."""


def warn_of_line(path: Path, number: int, digest: bytes, error: Exception) -> None:
    """Warn that a line of `path` is skipped, once per `digest`: the line's number may change."""
    message = f"{path}:{number}: skipped, {error}; `qlora-compile records prune` removes it"
    _warn_once((path.absolute(), digest), message)


def warn_of_file(path: Path, error: Exception) -> None:
    """Warn that a whole file is skipped."""
    _warn_once((path.absolute(),), f"{path}: skipped, {error_text(error)}")


def warn_of_folder(folder: Path, error: Exception) -> None:
    """Warn that a folder cannot be used."""
    _warn_once(
        (folder.absolute(),),
        f"{folder}: {error_text(error)}; results are kept in this process only, set "
        "QLORA_COMPILE_CACHE to a folder that can be written",
    )


def error_text(error: Exception) -> str:
    """Return the text of a system's or a lock's error, without the path."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error) or type(error).__name__


def _warn_once(about: tuple[object, ...], message: str) -> None:
    """Warn, once per process for each `about`."""
    if about not in _SAID:
        _SAID.add(about)
        warnings.warn(message, RecordWarning, stacklevel=3)
