"""An earlier run in an output folder: what it lets another run do there."""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_compile.errors import OutputDirectoryError, ResumeError
from qlora_compile.outputs import checkpoints, damage, last_checkpoint
from qlora_compile.training.settings import FILE, RunSettings, settings_from

FIGURES = "metrics.json"
"""The file that a run writes last: a run without it has not ended."""

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_MAY_CHANGE = frozenset({"output", "steps", "epochs", "checkpoint_every", "on_nan"})
"""Settings that may differ when a run is resumed."""


def check_earlier_run(settings: RunSettings, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may write its output folder.

    Raises:
        OutputDirectoryError: an earlier run is there, to be neither resumed nor replaced.
        ResumeError: there is none to resume, or it had other settings.
    """
    output = Path(settings.output)
    checkpoint = last_checkpoint(output)
    where = str(output)
    if not resume:
        if overwrite:
            return
        if checkpoint:
            raise OutputDirectoryError(
                value=where,
                problem="it holds the checkpoints of an earlier run",
                remedy="--resume continues that run, --overwrite replaces it",
            )
        if any((output / name).exists() for name in (*_ADAPTER, FIGURES)):
            raise OutputDirectoryError(
                value=where,
                problem="it holds the results of an earlier training",
                remedy="--overwrite replaces them",
            )
        return
    if overwrite:
        raise ResumeError(
            value=where,
            problem="--overwrite would remove what --resume continues",
            remedy="pass one of the two",
        )
    if checkpoint is None:
        damaged = [f"{each.name}: {damage(each)}" for _, each in checkpoints(output)]
        raise ResumeError(
            value=where,
            problem="; ".join(["it holds no checkpoint", *damaged]),
            remedy="train without --resume first",
        )
    done = int(checkpoint.name.rpartition("-")[2])
    ended = (output / FIGURES).exists()
    steps = settings.steps
    if steps is not None and (done > steps or (done == steps and ended)):
        raise ResumeError(
            value=where,
            problem=f"step {done} of {steps} is done already",
            remedy=f"pass --steps above {done}",
        )
    file = output / FILE
    # Read like a --config file, so that a damaged one gives the same error.
    earlier = settings_from({}, file).written() if file.is_file() else {}
    now = settings.written()
    for name in sorted({*now, *earlier} - _MAY_CHANGE if earlier else ()):
        if earlier.get(name) != now.get(name):
            raise ResumeError(
                value=where,
                problem=f"the run had {name}={earlier.get(name)!r}, not {now.get(name)!r}",
                remedy="pass what the run had, or choose another directory",
            )


def remove_earlier_run(output: Path) -> None:
    """Remove the checkpoints of an earlier run, and its adapter, which would not fit a new run's
    settings."""
    for name in _ADAPTER:
        (output / name).unlink(missing_ok=True)
    for _, checkpoint in checkpoints(output):
        shutil.rmtree(checkpoint)
