"""Compares contenders until a given time: they are made together, then take steps in turn."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.peers.contenders import CONTENDERS, OURS
from bench.peers.race import Process, Run, take_turns
from bench.peers.settings import Setting

STEPPING = 0.2
"""The part of the time that is kept for steps. Contenders not ready by then are left out."""


def race(
    setting: Setting, names: tuple[str, ...], steps: int, until: float, folder: Path
) -> list[Run]:
    """Return the measurements of each contender. until: a time by time.monotonic. folder: for their
    caches, which the next comparison finds.

    All train on one batch over and over: the losses fall, so wrong gradients show in them. The
    processes start and make their models together. Ours takes its first step alone, because it
    tunes, then the others take theirs together; after that only one computes at a time.
    """
    runs = {name: Run(name) for name in names}
    processes: dict[str, Process] = {}
    ready = until - STEPPING * (until - time.monotonic())

    def answers(ask: Callable[[Process], dict[str, Any]], *, ours: bool | None = None) -> Iterator:
        """Yield each run with the result of `ask` for its process. ours: only ours, or all
        others."""
        for name, run in runs.items():
            if not run.failed and ours in (None, name == OURS):
                try:
                    yield run, ask(processes[name])
                except RuntimeError as error:
                    run.failed = str(error)
                    processes[name].close()

    try:
        for name, run in runs.items():
            if CONTENDERS[name].missing:
                run.failed = f"{CONTENDERS[name].needs} is not installed: make device-wheels"
            else:
                # Compilers that are started by a shell take no spaces in a path.
                caches = folder / re.sub(r"\W+", "_", name)
                processes[name] = Process.of(name, setting, 1, caches)
        for run, built in answers(lambda process: process.receive(ready)):
            run.build, run.stored = built["seconds"], built.get("stored", 0)
        for ours in (True, False):
            for name, run in runs.items():
                if not run.failed and ours == (name == OURS):
                    processes[name].send(("step", 0))
            for run, first in answers(lambda process: process.receive(ready), ours=ours):
                run.first = first["seconds"]
        for run, found in answers(lambda process: process.ask(("describe", 0), until)):
            run.describe(found)
        take_turns(runs, processes, steps, until)
    finally:
        for process in processes.values():
            process.close()
    return list(runs.values())
