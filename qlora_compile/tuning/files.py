"""Files of records: reads their lines, and replaces files so that no crash leaves one torn."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_compile.tuning.errors import RecordLineError
from qlora_compile.tuning.record import Record, from_line
from qlora_compile.tuning.warning import warn_of_line


@dataclass(frozen=True)
class Line:
    """One line of a file; `record` is None if the line holds none that this version reads."""

    raw: bytes
    record: Record | None


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file that are not blank; warn once of each that holds no record.

    Raises:
        OSError: the file cannot be read.
    """
    lines = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        record = None
        try:
            # Records are ASCII, so a replaced byte makes the line unreadable.
            record = from_line(raw.decode("ascii", errors="replace"))
        except RecordLineError as error:
            warn_of_line(path, number, hashlib.sha256(raw).digest(), error)
        lines.append(Line(raw, record))
    return lines


def records_of(lines: Iterable[Line]) -> Iterator[Record]:
    """Yield the records among `lines`."""
    return (line.record for line in lines if line.record is not None)


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
