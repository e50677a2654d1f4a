"""Warnings of tuning: records that cannot be read or kept, and problems without a measurement."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from qlora_compile.kernels.problem import Problem

_SAID: set[tuple[object, ...]] = set()


class RecordWarning(UserWarning):
    """A record could not be read or kept; tuning goes on without it."""


class WrongResultWarning(UserWarning):
    """A variant computed wrong numbers and will not be chosen; this is a bug in the package."""


class NotMeasuredWarning(UserWarning):
    """No measurement of a problem counts, so the cost model chooses for the problem."""


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


def warn_of_unmeasured(reasons: Mapping[Problem, str]) -> None:
    """Warn of problems for which no measurement counts, by the reason of each; once for all."""
    for problem, reason in reasons.items():
        others = f", nor are {len(reasons) - 1} more" if len(reasons) > 1 else ""
        message = (
            f"{problem} is not measured{others}: {reason}; the cost model chooses, "
            "`qlora-compile tune` on a quiet machine measures"
        )
        warnings.warn(message, NotMeasuredWarning, stacklevel=4)
        return


def error_text(error: Exception) -> str:
    """Return the text of a system's or a lock's error, without the path."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error) or type(error).__name__


def _warn_once(about: tuple[object, ...], message: str) -> None:
    """Warn, once per process for each `about`."""
    if about not in _SAID:
        _SAID.add(about)
        warnings.warn(message, RecordWarning, stacklevel=3)
