"""A cycle-approximate model of one SM running one kernel, on the real control words.

*Modelled, never measured.* What it follows: stall counts, scoreboards, barriers, groups of
asynchronous copies and of wgmma, the issue of one instruction per sub-core and cycle, how long
each unit stays busy, and one path to shared memory per SM. What it leaves out: bank conflicts,
DRAM and L2 bandwidth (a global access has one latency; bulk copies arrive in time), instruction
cache misses, and clocks that drop under load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.static.flow import Path
from bench.static.sm_step import Effect, Step, Unit, steps
from bench.static.sm_table import CTA_STAGGER, SUBCORES, Multiprocessor

NEVER = math.inf
SCOREBOARDS = 6
ITERATIONS = 16


class StuckError(RuntimeError):
    """No warp of the model could ever issue again: the kernel's synchronisation is not modelled."""


@dataclass(frozen=True)
class Timeline:
    """Cycles. total: from the first issue until all CTAs are done. period: of one loop iteration
    of every resident CTA, in the steady state; 0 where there is no loop."""

    total: float
    period: float


class _Warp:
    """Where one warp is: `step` is what it issues next, not before `earliest`, which depends on
    this warp alone, and, unless `unit` is NONE, not before that unit is free."""

    __slots__ = (
        *("subcore", "cta", "index", "iteration", "step", "earliest", "unit", "ready", "boards"),
        *("copies", "open_copy", "wgmmas", "marks", "waiting"),
    )

    step: Step
    unit: Unit
    earliest: float

    def __init__(self, subcore: int, cta: int, start: float) -> None:
        self.subcore = subcore
        self.cta = cta
        self.index = 0
        self.iteration = 0
        self.ready = start  # by its last stall or barrier
        self.boards = [0.0] * SCOREBOARDS
        self.copies: list[float] = []
        self.open_copy = 0.0
        self.wgmmas: list[float] = []
        self.marks: list[float] = []
        self.waiting = False


class _Machine:
    """The state of the SM; `run` moves it from start to end. Called once per instruction of every
    warp, its inner functions compare instead of calling max and min, which take twice the time."""

    def __init__(
        self, path: Path, sm: Multiprocessor, warps: int, ctas: int, iterations: int
    ) -> None:
        self.sm = sm
        self.warps_per_cta = warps
        self.iterations = iterations if path.loop else 0
        self.code: Sequence[Step] = steps([*path.before, *path.loop, *path.after], sm)
        self.loop_start = len(path.before)
        self.loop_end = self.loop_start + len(path.loop) if path.loop else -1
        self.subcores: list[list[_Warp]] = [[] for _ in range(SUBCORES)]
        self.free = [[0.0] * len(Unit) for _ in range(SUBCORES)]
        self.memory_free = 0.0
        self.arrived: dict[tuple[int, str], list[_Warp]] = {}
        self.wake = [0.0] * SUBCORES
        self.warps: list[_Warp] = []
        self.running = ctas * warps
        for cta in range(ctas):
            for number in range(warps):
                warp = _Warp(number % SUBCORES, cta, float(cta * CTA_STAGGER))
                self._settle(warp)
                self.subcores[warp.subcore].append(warp)
                self.warps.append(warp)

    def run(self) -> float:
        time = 0.0
        while self.running:
            for subcore in range(SUBCORES):
                if self.wake[subcore] <= time:
                    self.wake[subcore] = self._issue(subcore, time)
            following = min(self.wake)
            if following == NEVER:
                raise StuckError(
                    f"{self.running} of {len(self.warps)} warps wait for each other at cycle {time}"
                )
            time = max(time + 1.0, math.ceil(following))
        return time

    def _issue(self, subcore: int, time: float) -> float:
        """Issues of one warp what can be issued now; the time of the sub-core's next chance.

        The warps take turns: the one that issued goes to the end of the queue, with those that
        could not before it.
        """
        warps = self.subcores[subcore]
        free = self.free[subcore]
        chance = NEVER
        for position, warp in enumerate(warps):
            earliest = warp.earliest
            if warp.unit >= 0 and free[warp.unit] > earliest:
                earliest = free[warp.unit]
            if earliest <= time:
                self.subcores[subcore] = warps[position + 1 :] + warps[: position + 1]
                self._execute(warp, free, time)
                return time + 1.0
            if earliest < chance:
                chance = earliest
        return chance

    def _execute(self, warp: _Warp, free: list[float], time: float) -> None:
        step = warp.step
        effect = step.effect
        released = time
        if effect is Effect.WGMMA:
            released = self._occupy_memory(step.memory, time)
            end = max(max(free[Unit.TENSOR], time) + step.busy, released)
            free[Unit.TENSOR] = end
            if step.group_end:
                warp.wgmmas.append(end + step.latency)
        elif step.unit >= 0:
            free[step.unit] = time + step.busy
        if effect is Effect.MEMORY:
            released = self._occupy_memory(step.memory, time)
        elif effect is Effect.ASYNCHRONOUS_COPY:
            released = self._occupy_memory(step.memory, time)
            warp.open_copy = max(warp.open_copy, released + step.latency)
        elif effect is Effect.CLOSE_COPIES:
            warp.copies.append(max(warp.open_copy, time))
            warp.open_copy = 0.0
        done = released + step.latency
        boards = warp.boards
        if step.write < SCOREBOARDS and boards[step.write] < done:
            boards[step.write] = done
        if step.read < SCOREBOARDS:
            read = min(done, released + self.sm.read_latency)
            if boards[step.read] < read:
                boards[step.read] = read
        warp.ready = time + step.stall
        if effect is Effect.BARRIER:
            self._arrive(warp, step, time)
        self._advance(warp, time)

    def _occupy_memory(self, cycles: float, time: float) -> float:
        """When the SM's memory path has served this and all before it."""
        start = self.memory_free if self.memory_free > time else time
        self.memory_free = start + cycles
        return self.memory_free

    def _arrive(self, warp: _Warp, step: Step, time: float) -> None:
        key = (warp.cta, step.barrier)
        arrived = self.arrived.setdefault(key, [])
        arrived.append(warp)
        warp.waiting = step.blocks
        if len(arrived) < (step.arrivals or self.warps_per_cta):
            return
        del self.arrived[key]
        release = time + self.sm.barrier_cycles
        for other in arrived:
            if other.waiting:
                other.waiting = False
                other.ready = max(other.ready, release)
                if other is not warp:
                    self._settle(other)
                    self.wake[other.subcore] = min(self.wake[other.subcore], other.earliest)

    def _advance(self, warp: _Warp, time: float) -> None:
        warp.index += 1
        if warp.index == self.loop_end:
            warp.iteration += 1
            warp.marks.append(time)
            if warp.iteration < self.iterations:
                warp.index = self.loop_start
        if warp.waiting:
            warp.earliest = NEVER
        else:
            self._settle(warp)

    def _settle(self, warp: _Warp) -> None:
        """When the warp's own waits are over: stall, scoreboards, outstanding groups; never at the
        end of the program."""
        if warp.index == len(self.code):
            warp.earliest = NEVER
            self.running -= 1
            return
        step = warp.step = self.code[warp.index]
        warp.unit = Unit.NONE if step.effect is Effect.WGMMA else step.unit
        earliest = warp.ready
        for board in step.waits:
            if warp.boards[board] > earliest:
                earliest = warp.boards[board]
        if step.copies_left >= 0:
            warp.copies, until = _outstanding(warp.copies, step.copies_left)
            earliest = max(earliest, until)
        if step.wgmmas_left >= 0:
            warp.wgmmas, until = _outstanding(warp.wgmmas, step.wgmmas_left)
            earliest = max(earliest, until)
        warp.earliest = earliest


def _outstanding(ends: list[float], left: int) -> tuple[list[float], float]:
    """The last `left` groups, and when all before them have ended (groups end in order)."""
    split = max(0, len(ends) - left)
    return ends[split:], max(ends[:split], default=0.0)


def simulate(
    path: Path, sm: Multiprocessor, *, warps: int, ctas: int, iterations: int = ITERATIONS
) -> Timeline:
    """Runs `ctas` CTAs of `warps` warps side by side on one SM; the loop `iterations` times.

    Raises StuckError where the warps wait for what the model does not know.
    """
    machine = _Machine(path, sm, warps, ctas, iterations)
    total = machine.run()
    if not path.loop:
        return Timeline(total, 0.0)
    # After the start has settled and before the first CTA leaves the others alone; of the usual
    # sixteen iterations six, so that bursts of two or three count whole.
    first, last = iterations // 2 - 1, iterations - 3
    spans = [(warp.marks[last] - warp.marks[first]) / (last - first) for warp in machine.warps]
    return Timeline(total, sum(spans) / len(spans))
