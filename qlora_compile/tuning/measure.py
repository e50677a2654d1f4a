"""Measurement: checks all candidates for one problem, then times the correct ones in turn."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.tuning.correctness import Correctness
from qlora_compile.tuning.operands import Operands, operands
from qlora_compile.tuning.plain_mode import plain_mode

_ROTATED_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
_LARGEST_ROTATION = 8
"""Timed runs rotate among copies of the operands, so that caches are cold. There are as many copies
as fill _ROTATED_BYTES, but at most this many: making more would take longer than the timing."""

_FEWEST_TIMINGS, _MOST_TIMINGS = 3, 40
_PATIENCE = 3
"""Measuring may take this many times the given seconds, until every candidate has _FEWEST_TIMINGS
that nothing disturbed."""

_SPIN_CYCLES = 4_000_000
"""About two milliseconds, more than any call takes to launch."""

_DISTURBED = 2.0
"""A timing is disturbed if it exceeds this many times the least one."""

_WORSE = {2: 2.0, 3: 1.25, 6: 1.0}
"""By number of timings: a candidate is dropped if its best timing exceeds this many times the
median of the fastest candidate. The best of six timings of an equally fast one does so once in 64
times."""


def rejected_errors() -> tuple[type[Exception], ...]:
    """Return the errors for which a candidate is rejected: torch's and Triton's own.

    Any other error is a mistake in a variant and is passed on to the caller.
    """
    errors: tuple[type[Exception], ...] = (MemoryError, RuntimeError)
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        errors += (TritonError,)
    return errors


@dataclass
class Measurement:
    """The result of measuring. seconds: every timing of each correct candidate, by its index.
    rejected: the reasons against the other candidates, by index."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)

    def undisturbed(self, index: int) -> list[float]:
        """Return a candidate's timings without those in which other work had the machine.

        Other work only ever adds time, on a busy CPU many times the time that is measured.
        """
        limit = _DISTURBED * min(self.seconds[index])
        return [taken for taken in self.seconds[index] if taken <= limit]

    def median(self, index: int) -> float:
        return statistics.median(self.undisturbed(index))

    def spread(self, index: int) -> float:
        """Return the interquartile range in seconds."""
        taken = self.undisturbed(index)
        if len(taken) < 2:
            return 0.0
        low, _, high = statistics.quantiles(taken, n=4)
        return high - low

    @property
    def ranking(self) -> list[int]:
        """The indices of the correct candidates, fastest first."""
        return sorted(self.seconds, key=self.median)


def measure(
    problem: Problem,
    candidates: Sequence[Choice],
    seconds: float,
    on_run: Callable[[int], None] = lambda index: None,
    skipped: Sequence[int] = (),
) -> Measurement:
    """Time the candidates that give right results, for about `seconds` in all.

    The candidates take turns, so that whatever slows the machine slows all of them. Those that are
    clearly slower are dropped on the way. on_run: called with a candidate's index before each of
    its runs. skipped: the indices of candidates that must not run.
    """
    with plain_mode(problem.device):
        return _measured(problem, candidates, seconds, on_run, skipped)


def _measured(
    problem: Problem,
    candidates: Sequence[Choice],
    seconds: float,
    on_run: Callable[[int], None],
    skipped: Sequence[int],
) -> Measurement:
    result = Measurement()
    tried = [index for index in range(len(candidates)) if index not in skipped]
    try:
        rotation = _rotation(problem)
        correctness = Correctness(rotation[0])
    except rejected_errors() as error:
        result.rejected = dict.fromkeys(tried, f"its operands cannot be made: {_first_line(error)}")
        return result
    for index in tried:
        choice = candidates[index]
        on_run(index)
        try:
            wrong = correctness.problem_with(choice)
            if wrong is None:
                result.seconds[index] = [_timed(rotation[-1], choice)]
        except rejected_errors() as error:
            wrong = _first_line(error)
        if wrong is None:
            continue
        if torch.device(problem.device).type == "cuda":
            # A fault stays with the CUDA context and would fail all later candidates. Raised here,
            # it ends the process while it is known which candidate ran.
            torch.cuda.synchronize(problem.device)
        result.rejected[index] = wrong
    alive = list(result.seconds)
    start = time.monotonic()
    # A single candidate, with nothing to compare it with, keeps its one timing.
    for timings in range(1, _MOST_TIMINGS if len(alive) > 1 else 1):
        spent = time.monotonic() - start
        quiet = all(len(result.undisturbed(i)) >= _FEWEST_TIMINGS for i in alive)
        enough = spent > seconds or len(alive) < 2
        if timings >= _FEWEST_TIMINGS and enough and (quiet or spent > _PATIENCE * seconds):
            break
        # The order rotates, so that no candidate always runs after the same one.
        first = timings % max(len(alive), 1)
        for index in alive[first:] + alive[:first]:
            on_run(index)
            taken = _timed(rotation[timings % len(rotation)], candidates[index])
            result.seconds[index].append(taken)
        worse = min(factor for least, factor in _WORSE.items() if least <= timings + 1)
        fastest = min(map(result.median, alive), default=0.0)
        alive = [index for index in alive if min(result.seconds[index]) <= worse * fastest]
    return result


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _rotation(problem: Problem) -> list[Operands]:
    first = operands(problem)
    limit = _ROTATED_BYTES.get(torch.device(problem.device).type, 0)
    copies = min(_LARGEST_ROTATION, math.ceil(limit / max(first.nbytes, 1)))
    return [first, *(first.copied() for _ in range(1, copies))]


def _timed(call: Operands, choice: Choice) -> float:
    """Return the seconds of one run."""
    if call.x.device.type == "cuda":
        return device_seconds(lambda: call.run(choice.variant, choice.config))
    start = time.perf_counter()
    call.run(choice.variant, choice.config)
    return time.perf_counter() - start


def device_seconds(run: Callable[[], Any]) -> float:
    """Return the seconds that the launches of `run` take on the current GPU, without host time."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Everything is launched while the GPU spins: else its waiting for launches would be timed.
    torch.cuda._sleep(_SPIN_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
