"""Tells Triton's whole kernels from unfinished ones, such as a power cut leaves.

Triton's cache gives each kernel a folder of files, which a note there names. It renames whole files
into place without having the disk keep them, and reads what is there ever after: half a description
raises a JSONDecodeError at every start, half a binary an error of the driver's or worse.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qlora_compile.json_text import parsed_json
from qlora_compile.kernels.object_file import is_whole_object

_BINARIES = (".cubin", ".hsaco")


def is_torn(note: Path) -> bool:
    """Return whether a note, or a file that it names, is torn."""
    try:
        return not are_whole(map(Path, parsed_json(note.read_text())["child_paths"].values()))
    except FileNotFoundError:  # removed meanwhile
        return False
    except (ValueError, LookupError, TypeError, AttributeError):
        return True


def are_whole(files: Iterable[Path]) -> bool:
    """Return whether the files of a kernel are there, and those that are run whole."""
    try:
        return all(map(_is_whole, files))
    except (OSError, ValueError):
        return False


def _is_whole(file: Path) -> bool:
    """Raises ValueError if the file is no JSON, OSError if it cannot be read."""
    if file.suffix == ".json":
        return isinstance(parsed_json(file.read_text()), dict)
    # Nothing reads the text of earlier stages but people.
    return file.exists() and (file.suffix not in _BINARIES or is_whole_object(file))
