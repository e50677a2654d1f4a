"""RecordStore: a folder of records, which many processes read and write at once."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from qlora_compile.kernels.problem import Problem
from qlora_compile.tuning.contents import FolderContents
from qlora_compile.tuning.errors import RecordFileError
from qlora_compile.tuning.files import (
    Line,
    read_lines,
    records_of,
    remove_temporaries,
    replace_file,
)
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
from qlora_compile.tuning.warning import told, warn_of_folder

OWN_FILE = "records.jsonl"
_LOCK_FILE = "records.lock"
_KEY_LOCKS = "locks"
_WRITING = "writing-"  # temporaries of whoever holds the lock; others' are not the next one's
_EXPORTING = "exporting-"
# A write takes milliseconds. Rather than wait for a holder that was stopped, go on without.
LOCK_SECONDS = 10.0

# What a folder that cannot be used raises. filelock's Timeout is an OSError; older versions raise
# NotImplementedError where a file system has no locks.
UNUSABLE = (OSError, NotImplementedError)


def cache_folder() -> Path:
    """Where records are kept: $QLORA_COMPILE_CACHE, else the user's cache folder of this name."""
    chosen = os.environ.get("QLORA_COMPILE_CACHE")
    if chosen:
        return Path(chosen)
    return platformdirs.user_cache_path("qlora-compile", appauthor=False)


class RecordStore:
    """The records in the *.jsonl files directly in `folder`, which need not exist.

    Files are read sorted by name, but records.jsonl last, the only one `append` and `merge` write;
    of records with one key the last wins. A line that holds no record is skipped with a warning,
    once a process, and stays where it is until `prune`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own = folder / OWN_FILE
        self._unwritten: dict[Key, Record] = {}
        self._contents = FolderContents(folder, last=OWN_FILE)
        # Threads of one process; the backward pass has its own. Readers need none.
        self._writers = threading.Lock()

    def read(self) -> dict[Key, Record]:
        """All records, also those of this store that could not be written."""
        return {**self._contents.records(), **self._unwritten}

    def find(self, problem: Problem, here: Fingerprint) -> Record | None:
        """The latest record of `problem` that holds here. Unchanged files are not read again."""
        written = latest(self._contents.by_problem(), problem, here)
        return latest(by_problem(self._unwritten.values()), problem, here) or written

    def append(self, record: Record) -> None:
        """Write `record`, in place of one with its key in records.jsonl.

        Where the folder cannot be written this warns, once a process, and the record is found by
        this store alone, until a later `append` can write it.
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

    @contextlib.contextmanager
    def exclusive(
        self, problem: Problem, fingerprint: Fingerprint, *, timeout: float
    ) -> Iterator[bool]:
        """The right to measure one key, which one process holds at a time, until it leaves or dies.

        Yields whether it was to be had within `timeout` seconds (0: at once, -1: however long).
        Look for the record again once you hold it. Where the folder is unusable this warns, once a
        process, and yields True: measuring twice beats measuring never.
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
        """Take the records of other files into records.jsonl and return how many were new here.

        Of records with one key the one measured later wins, wherever it is.

        Raises:
            RecordFileError: a file cannot be read, or the folder not be written.
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
        """Write the records that hold on one of `fingerprints`, or all for None, to one file and
        return how many.

        Raises:
            RecordFileError: there are none, or `path` exists and is not to be overwritten, or is
                this store's own file, or cannot be written.
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
            raise _file_error(path, told(error), "choose a path that can be written") from error
        return len(chosen)

    def prune(self, current: Collection[Fingerprint]) -> int:
        """Remove records of other sources and unreadable lines, and return how many lines in all.

        That is from every *.jsonl file of the folder. A record stays if one of `current` has the
        sources of its variants, its torch and its Triton: records of other devices, drivers and
        thread counts stay. Every line that holds no record goes, be it corrupted, of another
        version of records, or something else. `current` must hold what runs here: an empty one
        leaves nothing.

        Raises:
            RecordFileError: the folder cannot be read or written; no file is half pruned.
        """

        def fits(record: Record | None) -> bool:
            return record is not None and any(
                here.has_sources_of(record.fingerprint) for here in current
            )

        removed = 0
        with self._writers, self._must_write():
            for path in self._contents.paths():
                lines = read_lines(path)
                kept = [line.raw for line in lines if fits(line.record)]
                if len(kept) < len(lines):
                    replace_file(path, kept, _WRITING)
                    removed += len(lines) - len(kept)
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
        """Like `_exclusive_writer`, for what a person asked for: raises RecordFileError."""
        try:
            with self._exclusive_writer():
                yield
        except UNUSABLE as error:
            remedy = "make it a folder that can be written, or set QLORA_COMPILE_CACHE to another"
            raise _file_error(self.folder, told(error), remedy) from error

    def _write(self, records: dict[Key, Record]) -> None:
        lines = read_lines(self._own) if self._own.exists() else []
        kept = [line.raw for line in lines if line.record is None or line.record.key not in records]
        added = [to_line(record).encode() for record in records.values()]
        replace_file(self._own, kept + added, _WRITING)


class RecordFile:
    """The records of one file, as `RecordStore.export` writes it.

    Raises:
        RecordFileError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        records = {record.key: record for record in records_of(_lines_of(path))}
        self._records = by_problem(records.values())

    def find(self, problem: Problem, here: Fingerprint) -> Record | None:
        """Does as `RecordStore.find`."""
        return latest(self._records, problem, here)


def _lines_of(file: Path) -> list[Line]:
    try:
        return read_lines(file)
    except OSError as error:
        raise _file_error(file, told(error), "check the path") from error


def _keep_newer(records: dict[Key, Record], record: Record) -> None:
    known = records.get(record.key)
    if known is None or known.measured < record.measured:
        records[record.key] = record


def _file_error(path: Path, problem: str, remedy: str) -> RecordFileError:
    return RecordFileError(value=str(path), problem=problem, remedy=remedy)
