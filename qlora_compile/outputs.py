"""Output directories: whether one can be written, checked before long work starts."""

import tempfile
from pathlib import Path

from qlora_compile.errors import OutputDirectoryError


def check_writable(path: Path) -> None:
    """Check, creating nothing, that a directory is there and writable, or can be created.

    Raises:
        OutputDirectoryError: it cannot be written.
    """
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        problem = "this is a file" if existing == path.absolute() else f"{existing} is a file"
        raise _unwritable(path, problem)
    try:
        # An anonymous file: permissions say nothing of file systems that take no files.
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        problem = f"cannot write in {existing}: {error.strerror or type(error).__name__}"
        raise _unwritable(path, problem) from error


def writable_directory(path: Path) -> Path:
    """Create a directory if need be and check that a file can be written there.

    Raises:
        OutputDirectoryError: it cannot be written.
    """
    check_writable(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror or type(error).__name__) from error
    return path


def _unwritable(path: Path, problem: str) -> OutputDirectoryError:
    return OutputDirectoryError(
        value=str(path), problem=problem, remedy="choose a directory that can be written"
    )
