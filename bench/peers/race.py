"""Compares contenders, each in a process of its own, taking steps in turn."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.peers.contenders import CONTENDERS, OURS
from bench.peers.settings import Setting

ROOT = Path(__file__).parents[2]


class OutOfTimeError(RuntimeError):
    """A contender did not answer before the comparison has to end."""


@dataclass
class Run:
    """The measurements of one contender. build, first: seconds of making the model and of its first
    step, with empty caches. stored: bytes of its parameters and buffers. peak, saved: bytes that a
    step holds at most, and from its forward to its backward, beyond `stored` and the optimiser's.
    launched: the number of operators that called no others, or of a GPU's kernels. device_seconds,
    allocated: on a GPU, the seconds of a step's kernels and copies, and all bytes held at most.
    failed: what went wrong, or empty."""

    name: str
    build: float = 0.0
    first: float = 0.0
    stored: int = 0
    peak: int = 0
    saved: int = 0
    launched: int = 0
    device_seconds: float = 0.0
    allocated: int = 0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failed: str = ""

    def describe(self, found: dict[str, Any]) -> None:
        """Take over what a contender's process reports of a step."""
        for what in ("peak", "saved", "launched", "device_seconds", "allocated"):
            setattr(self, what, found.get(what, 0))


class Process:
    """A Python process that answers each line of JSON with a line of JSON. folder: for its log and
    caches. folders: those of packages that only this process has. root: the working tree."""

    def __init__(
        self,
        module: str,
        folder: Path,
        folders: Iterable[Path] = (),
        environment: Mapping[str, str] | None = None,
        root: Path = ROOT,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        path = [root, *folders, *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = os.environ | {
            **(environment or {}),
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "QLORA_COMPILE_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=root,
                env=variables,
            )

    @classmethod
    def of(
        cls, name: str, setting: Setting, batches: int, folder: Path, root: Path = ROOT
    ) -> Process:
        """Start a contender's process. Its first answer says how long making the model took."""
        contender = CONTENDERS[name]
        process = cls(contender.module, folder, contender.folders, contender.environment, root)
        process.send({"contender": name, "setting": setting.told, "batches": batches})
        return process

    def ask(self, order: Any, until: float = math.inf) -> dict[str, Any]:
        """Return the answer to `order`."""
        self.send(order)
        return self.receive(until)

    def send(self, order: Any) -> None:
        stdin = _pipe(self.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # `receive` says why it ended.
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()

    def receive(self, until: float = math.inf) -> dict[str, Any]:
        """Return the next answer. Raises RuntimeError if none comes, with the signal that killed
        the process or the error in its log. until: when to give up, by time.monotonic."""
        stdout = _pipe(self.process.stdout)
        # There is one answer to an order, so no line waits in a buffer that select does not see.
        wait = None if until == math.inf else max(until - time.monotonic(), 0.0)
        if not select.select([stdout], [], [], wait)[0]:
            raise OutOfTimeError("out of time")
        line = stdout.readline()
        if not line:
            code = self.process.wait()
            if code < 0:
                name = signal.Signals(-code).name
                raise RuntimeError(f"killed by {name}" + ", out of memory" * (name == "SIGKILL"))
            raise RuntimeError(error_in(self.log.read_text())[:300])
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def error_in(log: str) -> str:
    """Return the line of the last exception, which advice and quotations may follow; without one,
    the last line."""
    lines = log.strip().splitlines() or ["ended without a word"]
    named = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Unsupported|Interrupt|Exit)\b")
    return next((line for line in reversed(lines) if named.match(line)), lines[-1])


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def race(setting: Setting, names: list[str], steps: int, base: Path | None = None) -> list[Run]:
    """Take `steps` steps of each contender, in turn, in an order that rotates by one each time. The
    first step, which compiles and tunes, is reported separately. base: another commit's working
    tree, whose qlora_compile takes part too."""
    runs: dict[str, Run] = {}
    processes: dict[str, Process] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            chosen: list[str] = [*names, "base"] if base else names
            for index, name in enumerate(chosen):
                runs[name] = run = Run(name)
                contender = OURS if name == "base" else name
                if CONTENDERS[contender].missing:
                    run.failed = f"{CONTENDERS[contender].needs} is not installed"
                    continue
                root = base if name == "base" and base is not None else ROOT
                try:
                    process = Process.of(contender, setting, steps, Path(folder) / str(index), root)
                    processes[name] = process
                    built = process.receive()
                    first = process.ask(("step", 0))
                    run.describe(process.ask(("describe", 0)))
                except RuntimeError as error:
                    run.failed = str(error)
                    continue
                run.build, run.first = built["seconds"], first["seconds"]
                run.stored = built.get("stored", 0)
            take_turns(runs, processes, steps)
        finally:
            for process in processes.values():
                process.close()
    return list(runs.values())


def take_turns(
    runs: dict[str, Run], processes: dict[str, Process], steps: int, until: float = math.inf
) -> None:
    """Take the steps after the first of every contender that has not failed. until: when to end, by
    time.monotonic."""
    racing = [name for name, run in runs.items() if not run.failed]
    for step in range(1, steps):
        turn = step % max(len(racing), 1)
        for name in racing[turn:] + racing[:turn]:
            if runs[name].failed:
                continue
            try:
                answer = processes[name].ask(("step", step), until)
            except OutOfTimeError:
                return
            except RuntimeError as error:
                runs[name].failed = str(error)
                continue
            runs[name].seconds.append(answer["seconds"])
            if answer["loss"] is not None:
                runs[name].losses.append(answer["loss"])
