"""Measuring candidates for one problem: correct first, then timed in turn."""

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
"""Runs take turns among copies of the operands, of that many bytes or copies: not among so many
that making them would take longer than the timing."""

_FEWEST_TIMINGS, _MOST_TIMINGS = 3, 40
_PATIENCE = 3
"""The fewest should be timings that nothing disturbed; for them it may take so many times as long
as it was given."""

_SPIN_CYCLES = 4_000_000
"""Two milliseconds, and more than any call takes to launch."""

_DISTURBED = 2.0
_WORSE = {2: 2.0, 3: 1.25, 6: 1.0}
"""A candidate whose best of so many timings or more is above so many medians of the fastest is
timed no more. The best of six that are no slower exceeds the median once in 64 times."""


def rejected_errors() -> tuple[type[Exception], ...]:
    """What a candidate may raise and be rejected for it: torch's and Triton's own errors. Anything
    else is a mistake in a variant and goes on to the caller."""
    errors: tuple[type[Exception], ...] = (MemoryError, RuntimeError)
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        errors += (TritonError,)
    return errors


@dataclass
class Measurement:
    """seconds: every timing of each correct candidate, by its index. rejected: the other
    candidates' reasons."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)

    def undisturbed(self, index: int) -> list[float]:
        """The timings of a candidate less those in which something else had the machine: it only
        ever adds, and on a busy CPU it adds many times what is measured."""
        limit = _DISTURBED * min(self.seconds[index])
        return [taken for taken in self.seconds[index] if taken <= limit]

    def median(self, index: int) -> float:
        return statistics.median(self.undisturbed(index))

    def spread(self, index: int) -> float:
        """The interquartile range, seconds."""
        taken = self.undisturbed(index)
        if len(taken) < 2:
            return 0.0
        low, _, high = statistics.quantiles(taken, n=4)
        return high - low

    @property
    def ranking(self) -> list[int]:
        """The correct candidates, fastest first."""
        return sorted(self.seconds, key=self.median)


def measure(
    problem: Problem,
    candidates: Sequence[Choice],
    seconds: float,
    on_run: Callable[[int], None] = lambda index: None,
    skipped: Sequence[int] = (),
) -> Measurement:
    """Times the candidates that give right results, for about so many `seconds`.

    Interleaved, so that what slows the machine slows all of them, and over rotated operands. Those
    that are clearly slower are dropped on the way. on_run is called with a candidate's index before
    each of its runs; `skipped` ones do not run.
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
            # A fault stays with the context and would fail the others: here it ends the process,
            # while the one that ran is known.
            torch.cuda.synchronize(problem.device)
        result.rejected[index] = wrong
    alive = list(result.seconds)
    start = time.monotonic()
    # One that nothing is compared with has its one timing.
    for timings in range(1, _MOST_TIMINGS if len(alive) > 1 else 1):
        spent = time.monotonic() - start
        quiet = all(len(result.undisturbed(i)) >= _FEWEST_TIMINGS for i in alive)
        enough = spent > seconds or len(alive) < 2
        if timings >= _FEWEST_TIMINGS and enough and (quiet or spent > _PATIENCE * seconds):
            break
        # Nobody always runs behind the same neighbour.
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
    """Seconds of one run."""
    if call.x.device.type == "cuda":
        return device_seconds(lambda: call.run(choice.variant, choice.config))
    start = time.perf_counter()
    call.run(choice.variant, choice.config)
    return time.perf_counter() - start


def device_seconds(run: Callable[[], Any]) -> float:
    """Seconds that what `run` launches takes on the current accelerator, without the host's."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # While it spins, everything is launched: else its waiting for launches would be timed.
    torch.cuda._sleep(_SPIN_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
