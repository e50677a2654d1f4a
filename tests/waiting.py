"""Waiting for processes for as long as they work, however slow the machine is.

A limit in seconds is too short where a machine is busy, or stops all its processes for minutes, and
hides for as long that a process hangs. So what counts is what the processes use of the processors,
at looks of this process, which is stopped with them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

LOOK = 0.1
"""Seconds between two looks."""

LOOKS, LEAST = 3000, 1.5
"""Processes hang that within so many looks, 5 minutes of this process, use fewer seconds of a
processor than this. Only a machine that runs 200 times as much as it can gives them so little."""

MOST = 3600.0
"""Seconds of a processor that suffice for what is waited for; who uses more turns in a circle."""

_TICKS = os.sysconf("SC_CLK_TCK")


def wait_until(
    process: int,
    done: Callable[[], bool],
    *,
    looks: int = LOOKS,
    least: float = LEAST,
    most: float = MOST,
) -> None:
    """Wait until `done`; fail if the process and those below it no longer work."""
    first = before = _used(process)
    seen = 0
    while not done():
        time.sleep(LOOK)
        seen += 1
        if seen % looks == 0:
            now = _used(process)
            assert now - before >= least, "it hangs"
            assert now - first < most, "it turns in a circle"
            before = now


class Job:
    """A process that was started, and those below it.

    process: the first of them. What they write to standard output and error goes into one file.
    """

    def __init__(self, process: subprocess.Popen[bytes], written: IO[bytes]) -> None:
        self.process = process
        self._written = written

    def said(self) -> str:
        """Return what the processes have written so far."""
        self._written.seek(0)
        return self._written.read().decode(errors="replace")

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self) -> str:
        """Wait for the end; return what was written."""
        self.wait_until(self.ended)
        return self.said()

    def wait_until(self, done: Callable[[], bool], **limits: Any) -> None:
        """Wait as `wait_until`; fail too if the job ends before."""

        def looked() -> bool:
            ended = self.ended()
            found = done()
            assert found or not ended, "it ended too early"
            return found

        try:
            wait_until(self.process.pid, looked, **limits)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from error

    def children(self) -> list[int]:
        return _children(self.process.pid)

    def kill(self) -> None:
        """End all processes that are left, and wait until they have."""
        family = _family(self.process.pid)
        for each in family:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self.process.wait()
        while any(map(runs, family)):
            time.sleep(LOOK)


@contextmanager
def job(command: list[str], **options: Any) -> Iterator[Job]:
    """Start a process, with options of Popen; outside the context nothing of it is left."""
    with tempfile.TemporaryFile() as written:
        process = subprocess.Popen[bytes](command, stdout=written, stderr=written, **options)
        started = Job(process, written)
        try:
            yield started
        finally:
            if not started.ended():
                started.kill()


def runs(process: int) -> bool:
    """Return whether a process has not ended; one that has may be there until it is asked about."""
    return _fields(process)[:1] not in ([], ["Z"])


def _children(process: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread or process has ended
            found += map(int, file.read_text().split())
    return found


def _family(process: int) -> list[int]:
    found = [process]
    for each in found:
        found += _children(each)
    return found


def _used(process: int) -> float:
    return sum(map(_seconds, _family(process)))


def _seconds(process: int) -> float:
    """The processor time of a process, and of those that it has started and waited for."""
    return sum(map(int, _fields(process)[11:15])) / _TICKS


def _fields(process: int) -> list[str]:
    """What the system says of a process, from its state on; nothing if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
