"""FolderContents: the records in a folder's files; a file is read again only after it changed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qlora_compile.kernels.problem import Problem
from qlora_compile.tuning.files import read_lines, records_of
from qlora_compile.tuning.record import Key, Record, by_problem
from qlora_compile.tuning.warning import warn_of_file, warn_of_folder


class _Stamp(NamedTuple):
    """Attributes of a file that change whenever its content does."""

    modified: int
    size: int
    inode: int


class _Contents(NamedTuple):
    """The records that were read: of each file, and of all files merged."""

    stamps: dict[Path, _Stamp]
    files: dict[Path, dict[Key, Record]]
    records: dict[Key, Record]
    by_problem: dict[Problem, list[Record]]


class FolderContents:
    """The records in the *.jsonl files directly in `folder`, read in the order of their names.

    The file named `last` is read last. Of records with one key the last one wins. A folder that
    does not exist is empty. Warns of what cannot be read, once per process, and raises nothing.
    """

    def __init__(self, folder: Path, last: str) -> None:
        self._folder = folder
        self._last = last
        self._contents = _Contents({}, {}, {}, {})

    def paths(self) -> list[Path]:
        """Return the files in the order they are read."""
        try:
            paths = [path for path in self._folder.iterdir() if path.suffix == ".jsonl"]
        except FileNotFoundError:
            return []
        except OSError as error:
            warn_of_folder(self._folder, error)
            return []
        return sorted(paths, key=lambda path: (path.name == self._last, path.name))

    def records(self) -> dict[Key, Record]:
        """Return the records by key; the caller must not change the dictionary."""
        return self._read().records

    def by_problem(self) -> dict[Problem, list[Record]]:
        """Return the records by portable problem; the caller must not change the dictionary."""
        return self._read().by_problem

    def _read(self) -> _Contents:
        # Take the stamps first: a file that changes after that is read again next time.
        stamps = self._stamps()
        before = self._contents
        if stamps == before.stamps:
            return before
        files = {}
        for path, stamp in stamps.items():
            if before.stamps.get(path) == stamp:
                files[path] = before.files[path]
                continue
            files[path] = {}
            try:
                files[path] = {record.key: record for record in records_of(read_lines(path))}
            except FileNotFoundError:
                pass  # gone since it was listed
            except OSError as error:
                warn_of_file(path, error)
        records = {key: record for found in files.values() for key, record in found.items()}
        # One assignment, because other threads read without a lock.
        self._contents = _Contents(stamps, files, records, by_problem(records.values()))
        return self._contents

    def _stamps(self) -> dict[Path, _Stamp]:
        stamps = {}
        for path in self.paths():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            except OSError as error:
                warn_of_file(path, error)
                continue
            stamps[path] = _Stamp(status.st_mtime_ns, status.st_size, status.st_ino)
        return stamps
