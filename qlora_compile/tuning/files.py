"""Files of records: reading their lines, and replacing a file so that no death tears it."""

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
    """One line of a file; `record` is None where it holds none that this version reads."""

    raw: bytes
    record: Record | None


def read_lines(path: Path) -> list[Line]:
    """The lines of a file that are not blank; warns once of each that holds no record.

    Raises:
        OSError: the file cannot be read.
    """
    lines = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        record = None
        try:
            # A replaced byte makes an unreadable line of it, as records are ASCII.
            record = from_line(raw.decode("ascii", errors="replace"))
        except RecordLineError as error:
            warn_of_line(path, number, hashlib.sha256(raw).digest(), error)
        lines.append(Line(raw, record))
    return lines


def records_of(lines: Iterable[Line]) -> Iterator[Record]:
    """The records among `lines`."""
    return (line.record for line in lines if line.record is not None)


def replace_file(path: Path, lines: Sequence[bytes], temporary: str) -> None:
    """Make `lines` the content of `path`: whoever reads it, or dies here, sees the old file or the
    new one. `temporary` begins the name of the file, beside `path`, that is written before.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    # Named anew each time: were a file system's locks to fail, writers would still not mix. Not by
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
    """Remove what writers left behind that died in `replace_file`.

    Raises:
        OSError: one cannot be removed.
    """
    for path in folder.glob(f"{temporary}*.tmp"):
        path.unlink(missing_ok=True)
