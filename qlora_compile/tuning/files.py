"""Files of records: reads their lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
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
