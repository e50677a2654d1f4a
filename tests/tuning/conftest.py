"""A process that forks writers, for the tests of one module."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Writers:
    """The process of tests/tuning/writer.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._said: list[list[str]] = []
        self.expect("ready")

    def start(self, *children: str) -> list[int]:
        """Fork children, each given by the words of a command, and return their ids."""
        assert self._process.stdin is not None
        self._process.stdin.write("\t".join(children) + "\n")
        self._process.stdin.flush()
        self._said = []
        born = []
        while len(born) < len(children):
            words = self._line()
            if words[0] == "born":
                born.append(int(words[1]))
            else:
                self._said.append(words)
        return born

    def until_dead(self) -> tuple[list[list[str]], list[int]]:
        """Return what the children said, in words, and their exit codes."""
        while True:
            words = self._line()
            if words[0] == "dead":
                return self._said, [int(code) for code in words[1:]]
            self._said.append(words)

    def expect(self, *words: str) -> None:
        """The next line, or what was said while the children were started, is this."""
        line = self._said.pop(0) if self._said else self._line()
        assert line == list(words)

    def _line(self) -> list[str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.endswith("\n"), "the writers' process died"
        return line.split()


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    if sys.platform == "win32":
        pytest.skip("forks")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.tuning.writer"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield Writers(process)
        finally:
            # With the children of a test that failed before they ended.
            os.killpg(process.pid, signal.SIGKILL)
