"""Modes: the values of `optimize(tune=...)`, and the tuner of each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from qlora_compile.tuning import cpu_figures
from qlora_compile.tuning.cache_folder import cache_folder
from qlora_compile.tuning.cpu_figures import measured_cpu
from qlora_compile.tuning.errors import TuneModeError
from qlora_compile.tuning.store import RecordFile, RecordStore
from qlora_compile.tuning.tuner import AUTO_BUDGET, Tuner
from qlora_compile.tuning.warning import RecordWarning

AUTO, MODEL, OFF = "auto", "model", "off"
SHIPPED = "shipped"
"""The name of selectors for the records of a path. The path is not part of the name: compiled code
holds the name, and with the path compile caches would be valid on this machine alone."""


def check_mode(tune: str | os.PathLike[str]) -> str:
    """Return `tune` in the form that regions hold: a mode, or the absolute path of records.

    Also give the mode's tuner its full budget again, and have it read changed records. Raises
    TuneModeError for any other value, RecordFileError for an unreadable file.
    """
    if tune in (AUTO, OFF, MODEL):
        mode = str(tune)
    elif isinstance(tune, (str, os.PathLike)) and os.fspath(tune) and Path(tune).exists():
        mode = str(Path(tune).resolve())
    else:
        raise TuneModeError(value=tune)
    tuner = tuner_of(mode)
    if tuner is None:
        return mode
    if mode not in (AUTO, OFF):
        # The records may have changed since the tuner was made, for another model.
        tuner.reopen(_store(Path(mode)))
    if mode == AUTO:
        tuner.refresh(AUTO_BUDGET)
    _use_known_cpu(tuner)
    return mode


def tuner_of(mode: str) -> Tuner | None:
    """Return this process's tuner for a mode; None for "model", where the cost model chooses.

    Raises RecordFileError for a file that cannot be read.
    """
    if mode == MODEL:
        return None
    # The cache folder is part of the key: the environment may have changed.
    key = mode, cache_folder()
    if key not in _tuners:
        _tuners[key] = _tuner(*key)
        _use_known_cpu(_tuners[key])
    return _tuners[key]


_tuners: dict[tuple[str, Path], Tuner] = {}


def forget_tuners() -> None:
    """Let the next `tuner_of` make a new tuner, as in a new process."""
    _tuners.clear()


def _tuner(mode: str, folder: Path) -> Tuner:
    if mode in (AUTO, OFF):
        return Tuner(mode, RecordStore(folder), AUTO_BUDGET if mode == AUTO else 0.0)
    return Tuner(SHIPPED, _store(Path(mode)), 0.0)


def builds_for_measuring(mode: object) -> list[Callable[[], object]]:
    """Return the calls that build the C++ by which a mode's tuner will measure this CPU."""
    if mode != AUTO or measured_cpu(cache_folder(), measures=False) is not None:
        return []
    return cpu_figures.builds()


def _store(path: Path) -> RecordFile | RecordStore:
    if not path.exists():
        message = f"{path} is gone: the cost model chooses in place of its records"
        warnings.warn(message, RecordWarning, stacklevel=2)
    return RecordFile(path) if path.is_file() else RecordStore(path)


def _use_known_cpu(tuner: Tuner) -> None:
    model = measured_cpu(cache_folder(), measures=False)
    if model is not None:
        tuner.selector.use_cpu(model)
