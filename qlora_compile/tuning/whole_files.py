"""Replaces files so that no crash leaves one torn."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

UNLOCKED = "unlocked-"
"""Begins the names of temporary files whose writers hold no lock. Who holds a lock removes files
with another beginning, for only a dead holder can have left those."""


def replace_file(path: Path, lines: Sequence[bytes], temporary: str) -> None:
    """Replace the content of `path` by `lines`, atomically.

    A reader sees the old file or the new one, even if this process dies. `temporary` begins the
    name of the file that is written first, beside `path`.

    Raises:
        OSError: the file cannot be written; `path` is unchanged.
    """
    # A new name each time, so that writers do not mix even if a file system's locks fail. Not by
    # tempfile, whose files no other user of a shared folder may read.
    written = path.with_name(f"{temporary}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with written.open("xb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def remove_temporaries(folder: Path, temporary: str) -> None:
    """Remove the temporary files of writers that died in `replace_file`.

    Raises:
        OSError: a file cannot be removed.
    """
    for path in folder.glob(f"{temporary}*.tmp"):
        path.unlink(missing_ok=True)
