"""Load: the other work on the machine during a measurement."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_compile.tuning.caution import Caution

try:
    import resource
except ImportError:  # Windows
    resource = None

PROC_STAT = Path("/proc/stat")
_TICKS = 3
"""The kernel counts CPU time in ticks; this many may belong to the time before or after."""

_FEW = 3
"""This many preemptions happen in any run, and say nothing about a short one."""


@dataclass(frozen=True)
class Load:
    """The other work on the machine during a measurement; None where the system does not tell.

    spread: interquartile range of the rounds' speeds, as a part of their median; a round's speed is
    that of the candidates that took part to the end. drift: how many times as slow the second half
    of the rounds was as the first, or the inverse, whichever is above 1. others: CPUs that other
    processes used, beyond those that torch's threads leave free. stolen: the part of the CPUs' time
    that the hypervisor gave to other guests. preemptions: involuntary context switches per second
    of this process's CPU time; also None if torch has more threads than CPUs, as these then preempt
    each other. On a GPU the last three are None.
    """

    spread: float = 0.0
    drift: float = 1.0
    others: float | None = None
    stolen: float | None = None
    preemptions: float | None = None

    def disturbance(self, caution: Caution) -> str | None:
        """Return which limit of `caution` is exceeded and by what; None if none is."""
        if self.others is not None and self.others > caution.others:
            return f"other processes used {self.others:.1f} CPUs"
        if self.stolen is not None and self.stolen > caution.stolen:
            return f"the hypervisor took {self.stolen:.0%} of the CPUs"
        # If the system tells of others, any preemptions beside those are by our own threads.
        unknown = self.others is None
        if unknown and self.preemptions is not None and self.preemptions > caution.preemptions:
            return f"this process was preempted {self.preemptions:.0f} times a second"
        if self.drift > caution.drift:
            return f"its speed changed by a factor of {self.drift:.1f}"
        if self.spread > caution.spread:
            return f"its speed varied by {self.spread:.0%}"
        return None


@dataclass(frozen=True)
class Counters:
    """The system's counters at one moment, all in seconds but for `preemptions`.

    busy, stolen: the CPU time that all processes used and that the hypervisor took, on the `cpus`
    that this process may use; None without Linux's /proc/stat. own: the CPU time of this process
    and of its children that have ended, such as compilers.
    """

    wall: float
    own: float
    cpus: int
    busy: float | None
    stolen: float | None
    preemptions: int | None

    @classmethod
    def now(cls) -> Counters:
        """Read the counters, which takes about a tenth of a millisecond."""
        cpus = usable_cpus()
        busy, stolen = _cpu_seconds(cpus)
        children = os.times()
        usage = None if resource is None else resource.getrusage(resource.RUSAGE_SELF)
        return cls(
            wall=time.monotonic(),
            own=time.process_time() + children.children_user + children.children_system,
            cpus=len(cpus),
            busy=busy,
            stolen=stolen,
            preemptions=None if usage is None else usage.ru_nivcsw,
        )

    def load_since(self, before: Counters) -> Load:
        """Return the load between `before` and this moment, without spread and drift."""
        wall, own = self.wall - before.wall, self.own - before.own
        others = stolen = preemptions = None
        if wall > 0 and None not in (self.busy, before.busy, self.stolen, before.stolen):
            uncertain = _TICKS / _ticks_per_second()
            foreign = _difference(self.busy, before.busy) - own - uncertain
            free = max(self.cpus - torch.get_num_threads(), 0)
            others = max(foreign / wall - free, 0.0)
            taken = _difference(self.stolen, before.stolen) - uncertain
            stolen = max(taken / (wall * self.cpus), 0.0)
        crowded = torch.get_num_threads() > self.cpus
        if own > 0 and not crowded and None not in (self.preemptions, before.preemptions):
            switches = max(_difference(self.preemptions, before.preemptions) - _FEW, 0.0)
            preemptions = switches / own
        return Load(others=others, stolen=stolen, preemptions=preemptions)


def usable_cpus() -> frozenset[int]:
    """Return the numbers of the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def spread_and_drift(rounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the spread and the drift, as in `Load`, of the seconds of candidates that took turns.

    rounds: for each candidate its seconds, one for each round; 0.0 and 1.0 for too few rounds.
    """
    medians = [statistics.median(taken) for taken in rounds if taken]
    if not medians:
        return 0.0, 1.0
    speeds = [
        statistics.median(taken / median for taken, median in zip(each, medians, strict=True))
        for each in zip(*rounds, strict=True)
    ]
    if len(speeds) < 2:
        return 0.0, 1.0
    low, middle, high = statistics.quantiles(speeds, n=4, method="inclusive")
    half = len(speeds) // 2
    drift = 1.0
    if half >= 2:
        drift = statistics.median(speeds[-half:]) / statistics.median(speeds[:half])
    return (high - low) / middle, max(drift, 1 / drift)


def _difference(after: float | None, before: float | None) -> float:
    assert after is not None
    assert before is not None
    return after - before


def _ticks_per_second() -> int:
    return os.sysconf("SC_CLK_TCK")


def _cpu_seconds(cpus: frozenset[int]) -> tuple[float | None, float | None]:
    """Return the busy and the stolen seconds of `cpus` since the machine started."""
    try:
        lines = PROC_STAT.read_text().splitlines()
    except OSError:
        return None, None  # no Linux, or a sandbox that hides the file
    busy = stolen = 0
    for line in lines:
        name, *values = line.split()
        if not name.startswith("cpu") or name == "cpu" or int(name[3:]) not in cpus:
            continue
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])
        busy += user + nice + system + irq + softirq
        stolen += steal
    if not busy:
        return None, None  # sandboxes such as gVisor show zeros
    return busy / _ticks_per_second(), stolen / _ticks_per_second()
