"""The ways to choose that a user has: `optimize(tune=...)`."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from qlora_compile.tuning.cpu_figures import use_measured_cpu
from qlora_compile.tuning.errors import TuneModeError
from qlora_compile.tuning.store import RecordStore, cache_folder
from qlora_compile.tuning.tuner import AUTO_BUDGET, RecordFile, Tuner

AUTO, MODEL, OFF = "auto", "model", "off"
CACHE = "cache"
"""The source of the cache folder's records."""


def check_mode(tune: str | os.PathLike[str]) -> str:
    """`tune` as regions keep it: a mode, or the absolute path of records.

    Gives the mode its budget afresh. Raises TuneModeError for anything else.
    """
    if tune in (AUTO, OFF, MODEL):
        mode = str(tune)
    elif isinstance(tune, (str, os.PathLike)) and Path(tune).exists():
        mode = str(Path(tune).resolve())
    else:
        raise TuneModeError(value=tune)
    use_measured_cpu(cache_folder(), measures=False)
    tuner = tuner_of(mode)
    if tuner is not None and mode == AUTO:
        tuner.refresh(AUTO_BUDGET)
    return mode


def tuner_of(mode: str) -> Tuner | None:
    """The process's tuner for a mode; None where nothing but the cost model is asked."""
    return None if mode == MODEL else _tuner(mode, cache_folder())


@functools.cache
def _tuner(mode: str, folder: Path) -> Tuner:
    if mode in (AUTO, OFF):
        # Records of another folder, had the environment changed, are not this one's.
        source = f"{CACHE} {folder}"
        return Tuner(source, RecordStore(folder), AUTO_BUDGET if mode == AUTO else 0.0)
    path = Path(mode)
    records = RecordStore(path) if path.is_dir() else RecordFile(path)
    return Tuner(mode, records, 0.0)
