"""The parts of `make device`, the most valuable first, each with its share of the time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from bench.device.carried import CARRIED
from bench.device.correctness import correctness
from bench.device.race import race
from bench.peers.contenders import FLOOR, OURS, STOCK, STOCK_COMPILED, UNSLOTH, UNSLOTH_GRAPHS
from bench.peers.race import OutOfTimeError, Process
from bench.peers.settings import EXPERTS, LLAMA_1B, LLAMA_8B, Setting


class Part(ABC):
    """A part of the measurements. share: of the seconds left, which it may take; but at least
    `least` seconds, if that many are left."""

    least: ClassVar[float]
    share: ClassVar[float]

    @property
    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def run(self, until: float, folder: Path) -> dict[str, Any]:
        """Return the measurements, for JSON. until: a time by time.monotonic. folder: for
        caches."""

    def limit(self, left: float) -> float:
        return min(max(self.least, self.share * left), left)


@dataclass(frozen=True)
class Correctness(Part):
    """Tests that need a device. fifth: which fifth of them, from 0 to 4."""

    fifth: int = 0
    least = 20.0
    share = 0.2

    @property
    def title(self) -> str:
        return "A fifth of the tests that need a device"

    def run(self, until: float, folder: Path) -> dict[str, Any]:
        return {"kind": "correctness", **correctness(until, self.fifth)}


@dataclass(frozen=True)
class Race(Part):
    """A comparison of contenders. timed: whether speeds are reported."""

    setting: Setting
    names: tuple[str, ...]
    steps: int
    timed: bool = True
    least = 120.0
    share = 0.45

    @property
    def title(self) -> str:
        return str(self.setting)

    def run(self, until: float, folder: Path) -> dict[str, Any]:
        runs = race(self.setting, self.names, self.steps, until, folder)
        setting = asdict(self.setting)
        found = {"kind": "race", "setting": setting, "timed": self.timed}
        return {**found, "runs": [asdict(run) for run in runs]}


def _answers(
    process: Process, questions: Sequence[dict[str, Any]], device: str, until: float
) -> tuple[list[dict[str, Any]], str]:
    """Ask a process one question after another, and end it. Return each question with its answer,
    and why there are no further answers: no reason if time ran out after the first."""
    results: list[dict[str, Any]] = []
    failed = ""
    try:
        for question in questions:
            answer = process.ask(question | {"device": device}, until)
            results.append(question | answer)
    except OutOfTimeError as error:
        failed = "" if results else str(error)
    except RuntimeError as error:
        failed = str(error)
    finally:
        process.close()
    return results, failed


@dataclass(frozen=True)
class Op(Part):
    """The fused op alone. problems: rows of x, N and K."""

    problems: tuple[tuple[int, int, int], ...]
    device: str = "cuda"
    least = 60.0
    share = 1.0

    @property
    def title(self) -> str:
        return "The fused op alone"

    def run(self, until: float, folder: Path) -> dict[str, Any]:
        questions = [
            {"m": m, "n": n, "k": k, "direction": direction}
            for m, n, k in self.problems
            for direction in ("forward", "backward")
        ]
        process = Process("bench.device.op", folder / "op", [CARRIED / "bitsandbytes"])
        results, failed = _answers(process, questions, self.device, until)
        return {"kind": "op", "results": results, "failed": failed}


@dataclass(frozen=True)
class Plans(Part):
    """Plans beside launches from Python. formats: of the weights, one after another."""

    formats: tuple[str, ...] = ("nf4", "int8")
    device: str = "cuda"
    least = 45.0
    share = 0.1

    @property
    def title(self) -> str:
        return "Plans beside launches from Python"

    def run(self, until: float, folder: Path) -> dict[str, Any]:
        questions = [{"format": each} for each in self.formats]
        process = Process("bench.device.plans", folder / "plans")
        results, failed = _answers(process, questions, self.device, until)
        found = {"kind": "plans", "device": self.device, "results": results}
        return {**found, "failed": failed}


_1B = Setting(LLAMA_1B, 4, 512, layers=16, device="cuda", autocast=True)
_8B = replace(_1B, model=LLAMA_8B, layers=8, length=2048, checkpointing=True)
_EXPERTS = replace(_1B, model=EXPERTS, layers=4)
_ALL = (OURS, STOCK, STOCK_COMPILED, UNSLOTH, UNSLOTH_GRAPHS, FLOOR)

PARTS: tuple[Part, ...] = (
    Correctness(),
    Plans(),
    Race(_1B, _ALL, 21),
    Race(_8B, (OURS, STOCK, UNSLOTH, FLOOR), 11),
    Race(replace(_1B, batch_size=2), _ALL, 21),
    Race(replace(_1B, batch_size=1, length=4096), _ALL, 11),
    Race(_EXPERTS, (OURS, STOCK, UNSLOTH), 11),
    Op(tuple((m, n, k) for m in (8192, 1024) for n, k in ((4096, 4096), (14336, 4096)))),
)


def toy(part: Part) -> Part:
    """Return the same part for a CPU: small, not timed, and with one batch size per model."""
    if isinstance(part, Race):
        hidden = 512 if part.setting.model == EXPERTS else 128
        size = {"layers": 2, "hidden": hidden, "vocabulary": 512, "batch_size": 2, "length": 16}
        setting = replace(part.setting, device="cpu", **size)
        return replace(part, setting=setting, steps=3, timed=False)
    if isinstance(part, Plans):
        return replace(part, device="cpu")
    if isinstance(part, Op):
        return replace(part, device="cpu", problems=((16, 256, 128),))
    return part
