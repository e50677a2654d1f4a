"""The comparison: every contender in a process of its own, taking steps in turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.peers.contenders import CONTENDERS, OURS
from bench.peers.settings import Setting

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv" / "peers"
"""Where the packages are that only some contenders need."""


@dataclass
class Run:
    """What was measured of one contender. build, first: seconds of making the model and of its
    first step, with empty caches. stored: bytes of its parameters and buffers. peak, saved: bytes
    that a step holds at most, and from its forward to its backward, beyond these and the
    optimiser's. launched: operators that ran without calling others, or a GPU's kernels. failed:
    what went wrong, else empty."""

    name: str
    build: float = 0.0
    first: float = 0.0
    stored: int = 0
    peak: int = 0
    saved: int = 0
    launched: int = 0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failed: str = ""


class Process:
    """One contender's process, of this working tree or of another one at `root`."""

    def __init__(self, name: str, setting: Setting, steps: int, folder: Path, root: Path) -> None:
        folder.mkdir(parents=True)
        self.log = folder / "log"
        path = os.environ.get("PYTHONPATH")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), str(PEERS), *filter(None, [path])]),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "QLORA_COMPILE_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.peers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=root,
                env=environment,
            )
        order = {"contender": name, "setting": asdict(setting), "steps": steps}
        self.built = self.ask(order)

    def ask(self, order: Any) -> dict[str, Any]:
        """The answer to `order`. Raises RuntimeError without one: with the signal that killed the
        process, or else the last line of its log."""
        stdin, stdout = _pipe(self.process.stdin), _pipe(self.process.stdout)
        line = ""
        try:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = self.process.wait()
            if code < 0:
                name = signal.Signals(-code).name
                raise RuntimeError(f"killed by {name}" + ", out of memory" * (name == "SIGKILL"))
            raise RuntimeError(self.log.read_text().strip().splitlines()[-1][:300])
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def race(setting: Setting, names: list[str], steps: int, base: Path | None = None) -> list[Run]:
    """`steps` steps of each contender, in turn, in an order that moves on by one each time; the
    first, which compiles and tunes, is told apart. base: another commit's working tree, whose
    qlora_compile takes part too."""
    runs: dict[str, Run] = {}
    processes: dict[str, Process] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            chosen: list[str] = [*names, "base"] if base else names
            for index, name in enumerate(chosen):
                runs[name] = run = Run(name)
                contender = OURS if name == "base" else name
                if CONTENDERS[contender].missing and not PEERS.exists():
                    run.failed = f"{CONTENDERS[contender].needs} is not installed"
                    continue
                root = base if name == "base" and base is not None else ROOT
                try:
                    process = Process(contender, setting, steps, Path(folder) / str(index), root)
                    processes[name] = process
                    first = process.ask(("step", 0))
                    described = process.ask(("describe", 0))
                except RuntimeError as error:
                    run.failed = str(error)
                    continue
                run.build, run.first = process.built["seconds"], first["seconds"]
                run.stored = process.built.get("stored", 0)
                for what in ("peak", "saved", "launched"):
                    setattr(run, what, described.get(what, 0))
            racing = [name for name, run in runs.items() if not run.failed]
            for step in range(1, steps):
                turn = step % len(racing)
                for name in racing[turn:] + racing[:turn]:
                    if runs[name].failed:
                        continue
                    try:
                        answer = processes[name].ask(("step", step))
                    except RuntimeError as error:
                        runs[name].failed = str(error)
                        continue
                    runs[name].seconds.append(answer["seconds"])
                    if answer["loss"] is not None:
                        runs[name].losses.append(answer["loss"])
        finally:
            for process in processes.values():
                process.close()
    return list(runs.values())
