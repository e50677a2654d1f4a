"""RecordWarning: what the record store says when it goes on without something, once a process."""

from __future__ import annotations

import warnings
from pathlib import Path

_SAID: set[tuple[object, ...]] = set()


class RecordWarning(UserWarning):
    """A record could not be read or kept; tuning goes on without it."""


def warn_of_line(path: Path, number: int, digest: bytes, error: Exception) -> None:
    """A line of `path` is skipped; its number may change, its `digest` not."""
    told_once = f"{path}:{number}: skipped, {error}; `qlora-compile records prune` removes it"
    _warn_once((path.absolute(), digest), told_once)


def warn_of_file(path: Path, error: Exception) -> None:
    """A whole file is skipped."""
    _warn_once((path.absolute(),), f"{path}: skipped, {told(error)}")


def warn_of_folder(folder: Path, error: Exception) -> None:
    """A folder cannot be used."""
    _warn_once(
        (folder.absolute(),),
        f"{folder}: {told(error)}; what is measured is kept in this process only, set "
        "QLORA_COMPILE_CACHE to a folder that can be written",
    )


def told(error: Exception) -> str:
    """What a system's or a lock's error says, without its path."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error) or type(error).__name__


def _warn_once(about: tuple[object, ...], message: str) -> None:
    if about not in _SAID:
        _SAID.add(about)
        warnings.warn(message, RecordWarning, stacklevel=3)
