"""The sweep: worker processes, one at a time, each for a few types, with a limit on each type."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bench.coverage.row import TRAINS, Row

TYPES_PER_WORKER = 12
"""Types per process: importing takes as long as two types, but memory kept of each adds up to
gigabytes."""

_ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def sweep(names: list[str], limit: float, *, inductor: bool = False) -> Iterator[Row]:
    """Yield a row for each of `names`, in order. A type that crashes its process, or takes longer
    than `limit` seconds, gets a row that says so, and another process goes on after it."""
    waiting = list(names)
    while waiting:
        done = 0
        for row in _worker(waiting[:TYPES_PER_WORKER], limit, inductor):
            yield row
            done += 1
        waiting = waiting[done:]


def _worker(names: list[str], limit: float, inductor: bool) -> Iterator[Row]:
    """Yield the rows of one process, the last of them for the type that ended it early, if any."""
    command = [sys.executable, "-m", "bench.coverage.worker", *names]
    command += ["--inductor"] if inductor else []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=_ROOT,
        env=os.environ | _ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        try:
            for name in names:
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    yield lost(name, f"no result within {limit:g} s")
                    return
                if not line:
                    yield lost(name, f"its process ended with exit code {process.wait()}")
                    return
                yield Row(**json.loads(line))
        finally:
            process.kill()


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Pass on every line, and an empty one at the end."""
    for line in stream:
        lines.put(line)
    lines.put("")


def lost(name: str, problem: str) -> Row:
    """Return the row of a type whose process gave none. The fault is unknown; ours is assumed until
    somebody has looked."""
    return Row(name, "", stock=TRAINS, ours=problem)
