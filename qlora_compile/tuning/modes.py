"""The ways to choose that a user has: `optimize(tune=...)`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from qlora_compile.kernels import selection
from qlora_compile.tuning.cpu_figures import use_measured_cpu
from qlora_compile.tuning.errors import TuneModeError
from qlora_compile.tuning.store import RecordFile, RecordStore, cache_folder
from qlora_compile.tuning.tuner import AUTO_BUDGET, Tuner
from qlora_compile.tuning.warning import RecordWarning

AUTO, MODEL, OFF = "auto", "model", "off"
CACHE = "cache"
"""The source of the cache folder's records."""


def check_mode(tune: str | os.PathLike[str]) -> str:
    """`tune` as regions keep it: a mode, or the absolute path of records.

    Gives the mode its budget afresh. Raises TuneModeError for anything else, RecordFileError for a
    file that cannot be read.
    """
    if tune in (AUTO, OFF, MODEL):
        mode = str(tune)
    elif isinstance(tune, (str, os.PathLike)) and os.fspath(tune) and Path(tune).exists():
        mode = str(Path(tune).resolve())
        # Its records may have changed since another model was given it.
        _tuners.pop((mode, cache_folder()), None)
        selection.forget_source(mode)
    else:
        raise TuneModeError(value=tune)
    if mode != MODEL:
        use_measured_cpu(cache_folder(), measures=False)
    tuner = tuner_of(mode)
    if tuner is not None and mode == AUTO:
        tuner.refresh(AUTO_BUDGET)
    return mode


def tuner_of(mode: str) -> Tuner | None:
    """The process's tuner for a mode; None where nothing but the cost model is asked.

    Raises RecordFileError for a file that cannot be read.
    """
    if mode == MODEL:
        return None
    key = mode, cache_folder()
    if key not in _tuners:
        _tuners[key] = _tuner(*key)
    return _tuners[key]


_tuners: dict[tuple[str, Path], Tuner] = {}


def _tuner(mode: str, folder: Path) -> Tuner:
    if mode in (AUTO, OFF):
        # Records of another folder, had the environment changed, are not this one's.
        source = f"{CACHE} {folder}"
        return Tuner(source, RecordStore(folder), AUTO_BUDGET if mode == AUTO else 0.0)
    path = Path(mode)
    if not path.exists():
        message = f"{path} is gone: what it would have chosen is left to the cost model"
        warnings.warn(message, RecordWarning, stacklevel=2)
    return Tuner(mode, RecordFile(path) if path.is_file() else RecordStore(path), 0.0)
