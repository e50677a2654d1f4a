"""Output directories: checks that one can be written, and finds what a training has saved there."""

import math
import tempfile
from pathlib import Path

from qlora_compile.errors import OutputDirectoryError


def check_writable(path: Path) -> None:
    """Check that a directory is writable, or can be created; create nothing.

    Raises:
        OutputDirectoryError: the directory cannot be written.
    """
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        problem = "this is a file" if existing == path.absolute() else f"{existing} is a file"
        raise _unwritable(path, problem)
    try:
        # Try an anonymous file: permissions do not show that a file system is read-only or full.
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        problem = f"cannot write in {existing}: {error.strerror or type(error).__name__}"
        raise _unwritable(path, problem) from error


def writable_directory(path: Path) -> Path:
    """Create a directory if it does not exist, check that a file can be written there, return it.

    Raises:
        OutputDirectoryError: the directory cannot be written.
    """
    check_writable(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror or type(error).__name__) from error
    return path


def last_checkpoint(directory: Path, up_to: float = math.inf) -> Path | None:
    """Return the Trainer's newest whole checkpoint of a step `up_to` this one, None without one.

    The Trainer writes its state last: a checkpoint without that was interrupted.
    """
    folders = (file.parent for file in directory.glob("checkpoint-*/trainer_state.json"))
    steps = {folder: folder.name.rpartition("-")[2] for folder in folders}
    whole = {int(step): folder for folder, step in steps.items() if step.isdecimal()}
    return max(((n, folder) for n, folder in whole.items() if n <= up_to), default=(0, None))[1]


def _unwritable(path: Path, problem: str) -> OutputDirectoryError:
    return OutputDirectoryError(
        value=str(path), problem=problem, remedy="choose a directory that can be written"
    )
