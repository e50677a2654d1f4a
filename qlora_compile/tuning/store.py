"""RecordStore: a folder of records that many processes may read and write at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_compile.kernels.problem import Problem
from qlora_compile.tuning.contents import FolderContents
from qlora_compile.tuning.errors import RecordFileError
from qlora_compile.tuning.files import Line, read_lines, records_of
from qlora_compile.tuning.fingerprint import Fingerprint
from qlora_compile.tuning.record import (
    Key,
    Record,
    by_problem,
    key_digest,
    latest,
    portable,
    to_line,
)
from qlora_compile.tuning.warning import error_text, warn_of_folder
from qlora_compile.tuning.whole_files import remove_temporaries, replace_file

OWN_FILE = "records.jsonl"
_LOCK_FILE = "records.lock"
_KEY_LOCKS = "locks"
# Beginnings of temporary files' names. The holder of the lock removes files for writing that a dead
# holder has left. Exports are written without the lock, so their files have another name.
_WRITING = "writing-"
_EXPORTING = "exporting-"
# A write takes milliseconds. A longer wait means that the lock's holder was stopped: do without.
LOCK_SECONDS = 10.0

# The errors of a folder that cannot be used. filelock's Timeout is an OSError; its older versions
# raise NotImplementedError where a file system has no locks.
UNUSABLE = (OSError, NotImplementedError)


class RecordStore:
    """The records in the *.jsonl files directly in `folder`, which need not exist.

    Files are read sorted by name, but records.jsonl last; `append` and `merge` write that file
    only. Of records with one key the last one wins. A line that holds no record is skipped, with
    one warning per process, and stays in its file until `prune`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own = folder / OWN_FILE
        self._unwritten: dict[Key, Record] = {}
        self._contents = FolderContents(folder, last=OWN_FILE)
        # For the threads of this process, as the backward pass has its own. Readers take no lock.
        self._writers = threading.Lock()

    def read(self) -> dict[Key, Record]:
        """Return all records, also those that this store could not write."""
        return {**self._contents.records(), **self._unwritten}

    def find(self, problem: Problem, here: Fingerprint) -> Record | None:
        """Return the newest record of `problem` that `here` covers, None if there is none.

        Unchanged files are not read again.
        """
        written = latest(self._contents.by_problem(), problem, here)
        return latest(by_problem(self._unwritten.values()), problem, here) or written

    def append(self, record: Record) -> None:
        """Write `record` to records.jsonl, in place of the one with the same key.

        If the folder cannot be written, this warns once per process, and only this store finds the
        record until a later `append` can write it.
        """
        with self._writers:
            self._unwritten[record.key] = record
            try:
                with self._exclusive_writer():
                    self._write(self._unwritten)
            except UNUSABLE as error:
                warn_of_folder(self.folder, error)
            else:
                self._unwritten.clear()

    def discard(self, record: Record) -> None:
        """Remove `record` from every file of the folder; a newer one with its key stays.

        If the folder cannot be written, this warns, once per process, and the record stays.
        """

        def is_other(line: Line) -> bool:
            return line.record != record

        with self._writers:
            if self._unwritten.get(record.key) == record:
                del self._unwritten[record.key]
            try:
                with self._exclusive_writer():
                    self._keep(is_other)
            except UNUSABLE as error:
                warn_of_folder(self.folder, error)

    @contextlib.contextmanager
    def exclusive(
        self, problem: Problem, fingerprint: Fingerprint, *, timeout: float
    ) -> Iterator[bool]:
        """Hold the lock for measuring one key, which one process has until it leaves or dies.

        Yields whether the lock was free within `timeout` seconds (0: do not wait, -1: wait
        forever). Look for the record again once you have the lock: another process may have made
        it. If the folder is unusable, this warns once per process and yields True, because
        measuring twice is better than never.
        """
        name = key_digest((portable(problem), fingerprint))
        with contextlib.ExitStack() as held:
            try:
                folder = self.folder / _KEY_LOCKS
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(folder / f"{name}.lock").acquire(timeout=timeout))
            except Timeout:
                mine = False
            except UNUSABLE as error:
                warn_of_folder(self.folder, error)
                mine = True
            else:
                mine = True
            yield mine

    def merge(self, files: Iterable[Path]) -> int:
        """Add the records of other files to records.jsonl; return how many were new or newer.

        Of records with one key the one measured later wins, wherever it is stored.

        Raises:
            RecordFileError: a file cannot be read, or the folder cannot be written.
        """
        incoming: dict[Key, Record] = {}
        for file in files:
            for record in records_of(_lines_of(file)):
                _keep_newer(incoming, record)
        with self._writers, self._must_write():
            present = self._contents.records() | self._unwritten
            changed = {
                key: record
                for key, record in incoming.items()
                if key not in present or present[key].measured < record.measured
            }
            if changed:
                self._write(changed)
                for key in changed:
                    self._unwritten.pop(key, None)
        return len(changed)

    def export(
        self, path: Path, fingerprints: Collection[Fingerprint] | None, *, overwrite: bool = False
    ) -> int:
        """Write the records that one of `fingerprints` covers to one file; return how many.

        fingerprints: None for all records.

        Raises:
            RecordFileError: there are no such records; or `path` exists and `overwrite` is False,
                or is this store's own file, or cannot be written.
        """
        chosen = [
            record
            for record in self.read().values()
            if fingerprints is None or any(f.covers(record.fingerprint) for f in fingerprints)
        ]
        if path.resolve() == self._own.resolve():
            raise _file_error(path, "this is the store itself", "choose another file")
        if path.exists() and not overwrite:
            raise _file_error(path, "the file exists", "choose another, or --overwrite it")
        if not chosen:
            remedy = "tune first, or export --all" if self.read() else "tune first"
            raise _file_error(self.folder, "none to export", remedy)
        try:
            replace_file(path, sorted(to_line(record).encode() for record in chosen), _EXPORTING)
        except OSError as error:
            raise _file_error(
                path, error_text(error), "choose a path that can be written"
            ) from error
        return len(chosen)

    def prune(self, current: Collection[Fingerprint]) -> int:
        """Remove outdated records and unreadable lines; return the number of lines removed.

        This covers every *.jsonl file of the folder. A record stays if one of `current` has the
        same sources of its variants, torch and Triton, whatever its device, driver and thread
        count. Every line that holds no record is removed, whether it is corrupted, of another
        version, or something else. `current` must hold the fingerprints of this machine: if it is
        empty, every line is removed.

        Raises:
            RecordFileError: the folder cannot be read or written; no file is half pruned.
        """

        def fits(record: Record | None) -> bool:
            return record is not None and any(
                here.has_sources_of(record.fingerprint) for here in current
            )

        with self._writers, self._must_write():
            removed = self._keep(lambda line: fits(line.record))
            for key in [key for key, record in self._unwritten.items() if not fits(record)]:
                del self._unwritten[key]
        return removed

    @contextlib.contextmanager
    def _exclusive_writer(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / _LOCK_FILE, timeout=LOCK_SECONDS, poll_interval=0.01)
        with lock:
            remove_temporaries(self.folder, _WRITING)
            yield

    @contextlib.contextmanager
    def _must_write(self) -> Iterator[None]:
        """Do as `_exclusive_writer`, but raise RecordFileError, for what a person asked for."""
        try:
            with self._exclusive_writer():
                yield
        except UNUSABLE as error:
            remedy = "make it a folder that can be written, or set QLORA_COMPILE_CACHE to another"
            raise _file_error(self.folder, error_text(error), remedy) from error

    def _keep(self, stays: Callable[[Line], bool]) -> int:
        """Remove the other lines from every file of the folder; return how many. The caller holds
        the lock."""
        removed = 0
        for path in self._contents.paths():
            lines = read_lines(path)
            kept = [line.raw for line in lines if stays(line)]
            if len(kept) < len(lines):
                replace_file(path, kept, _WRITING)
                removed += len(lines) - len(kept)
        return removed

    def _write(self, records: dict[Key, Record]) -> None:
        lines = read_lines(self._own) if self._own.exists() else []
        kept = [line.raw for line in lines if line.record is None or line.record.key not in records]
        added = [to_line(record).encode() for record in records.values()]
        replace_file(self._own, kept + added, _WRITING)


class RecordFile:
    """The records of one file, as `RecordStore.export` writes it.

    Raises:
        RecordFileError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        records = {record.key: record for record in records_of(_lines_of(path))}
        self._records = by_problem(records.values())

    def find(self, problem: Problem, here: Fingerprint) -> Record | None:
        """Do as `RecordStore.find`."""
        return latest(self._records, problem, here)


def _lines_of(file: Path) -> list[Line]:
    try:
        return read_lines(file)
    except OSError as error:
        raise _file_error(file, error_text(error), "check the path") from error


def _keep_newer(records: dict[Key, Record], record: Record) -> None:
    known = records.get(record.key)
    if known is None or known.measured < record.measured:
        records[record.key] = record


def _file_error(path: Path, problem: str, remedy: str) -> RecordFileError:
    return RecordFileError(value=str(path), problem=problem, remedy=remedy)
