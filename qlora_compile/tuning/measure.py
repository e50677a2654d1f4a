"""Measurement: checks all candidates for one problem, then times the correct ones in turn."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.tuning.correctness import Correctness
from qlora_compile.tuning.judgement import Measurement
from qlora_compile.tuning.load import Counters, Load, spread_and_drift
from qlora_compile.tuning.operands import Operands, operands
from qlora_compile.tuning.plain_mode import plain_mode
from qlora_compile.tuning.rounds import WATCHED, run_rounds

_ROTATED_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
_LARGEST_ROTATION = 8
"""Timed runs rotate among copies of the operands, so that caches are cold. There are enough copies
to fill _ROTATED_BYTES, but at most this many: making more would take longer than the timing."""

_SPIN_CYCLES = 4_000_000
"""About two milliseconds, more than any call takes to launch."""


def rejected_errors() -> tuple[type[Exception], ...]:
    """Return the errors for which a candidate is rejected: torch's and Triton's own.

    Any other error is a mistake in a variant and is passed on to the caller.
    """
    errors: tuple[type[Exception], ...] = (MemoryError, RuntimeError)
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        errors += (TritonError,)
    return errors


def measure(
    problem: Problem,
    candidates: Sequence[Choice],
    seconds: float,
    on_run: Callable[[int], None] = lambda index: None,
    skipped: Sequence[int] = (),
) -> Measurement:
    """Time the candidates that give right results, for about `seconds` in all.

    The candidates, which are in the cost model's order, take turns, so that whatever slows the
    machine slows all of them. Those that are clearly slower are dropped on the way. on_run: called
    with a candidate's index before each of its runs. skipped: the indices of candidates that must
    not run.
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
    on_cpu = torch.device(problem.device).type == "cpu"
    checking = Counters.now()
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
    timing = Counters.now()
    watch = WATCHED - (timing.wall - checking.wall) if on_cpu else 0.0

    def time_one(index: int, turn: int) -> float:
        on_run(index)
        return _timed(rotation[turn % len(rotation)], candidates[index])

    run_rounds(result.seconds, time_one, seconds, watch=watch)
    counted = Load()
    if on_cpu:
        end = Counters.now()
        # In less time the counters show nothing: what the checks showed has to do.
        counted = end.load_since(timing if end.wall - timing.wall >= WATCHED else checking)
    spread, drift = spread_and_drift(result.rounds)
    result.load = replace(counted, spread=spread, drift=drift)
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
