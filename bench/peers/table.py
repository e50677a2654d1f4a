"""Writes the figures of a comparison as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from bench.paired import interval_of_median
from bench.peers.contenders import (
    CONTENDERS,
    FLOOR,
    OURS,
    STOCK,
    STOCK_COMPILED,
    TORCH_FLOOR,
    UNQUANTISED,
)
from bench.peers.race import Run
from bench.peers.settings import Setting

AGREEMENT = {"nf4": 0.02, "none": 0.1, "int8": 0.1, "hqq": 0.1}
"""The largest relative distance of a family's losses from stock's, on the mean over the steps. With
the same rounded weights it is due to 16-bit arithmetic, with others to the other rounding."""

TIME_TARGETS = {FLOOR: 1.15, TORCH_FLOOR: 1.0, STOCK: 0.72, STOCK_COMPILED: 0.80, UNQUANTISED: 1.0}
PEAK_TARGET, FIRST_TARGET = 0.6, 0.35

HEADER = (
    *("contender", "step s, median", "quartiles", "tokens/s", "ours / this", "95 % of it"),
    *("device s", "made in s", "first step s", "peak MB", "saved MB", "stored MB", "allocated MB"),
    *("launched", "last loss"),
)


def disagreement(runs: Iterable[Run]) -> list[str]:
    """Return why speeds must not be compared: contenders whose losses are not stock's."""
    by_name = {run.name: run for run in runs if run.losses and not run.failed}
    if STOCK not in by_name:
        return [f"{STOCK} did not train: there is nothing for losses to agree with"]
    problems = []
    stock = statistics.mean(by_name[STOCK].losses)
    for name, run in by_name.items():
        family = CONTENDERS[OURS if name == "base" else name].family
        apart = abs(statistics.mean(run.losses) / stock - 1)
        if not apart <= AGREEMENT[family]:
            problems.append(f"{name}: its losses are {apart:.1%} from those of {STOCK}")
    return problems


def ratios(runs: list[Run], other: str) -> list[float]:
    """Return seconds of ours over another contender's, step by step; empty if one has failed."""
    by_name = {run.name: run for run in runs if not run.failed}
    if not {OURS, other} <= by_name.keys():
        return []
    return [a / b for a, b in zip(by_name[OURS].seconds, by_name[other].seconds, strict=False)]


def section(setting: Setting, runs: list[Run], *, timed: bool = True) -> list[str]:
    """Return the lines of one setting, without speeds if the losses disagree or the steps were not
    `timed`, and without empty columns."""
    problems = disagreement(runs)
    lines = [f"## {setting}", "", *(f"- {problem}: no speed is told" for problem in problems)]
    told = timed and not problems
    rows = [
        [run.name, f"failed: {run.failed}", *[""] * (len(HEADER) - 2)]
        if run.failed
        else _cells(setting, runs, run, told=told)
        for run in runs
    ]
    shown = [i for i in range(len(HEADER)) if i < 2 or any(row[i] for row in rows)]
    lines += ["", _line(HEADER[i] for i in shown), _line(["---", *["---:"] * (len(shown) - 1)])]
    lines += [_line(row[i] for i in shown) for row in rows]
    if told:
        lines += ["", *(f"- {line}" for line in verdicts(runs))]
    return [*lines, ""]


def _cells(setting: Setting, runs: list[Run], run: Run, *, told: bool) -> list[str]:
    times = [""] * 8
    if told and len(run.seconds) > 1:
        low, median, high = statistics.quantiles(run.seconds, n=4)
        times[:3] = f"{median:#.4g}", f"{low:#.4g} to {high:#.4g}", f"{setting.tokens / median:.0f}"
        if pairs := ratios(runs, run.name):
            times[3] = f"{statistics.median(pairs):.3f}"
            times[4] = "{:.3f} to {:.3f}".format(*interval_of_median(pairs))
    if CONTENDERS[OURS if run.name == "base" else run.name].family == "floor":
        return [run.name, *times, *[""] * 6]
    if told:
        times[5] = f"{run.device_seconds:#.4g}" if run.device_seconds else ""
        times[6:] = f"{run.build:.1f}", f"{run.first:.1f}"
    sizes = (run.peak, run.saved, run.stored, run.allocated)
    return [
        run.name,
        *times,
        *(f"{size / 1e6:.0f}" if size else "" for size in sizes),
        str(run.launched or ""),
        f"{run.losses[-1]:.4f}" if run.losses else "",
    ]


def verdicts(runs: list[Run]) -> list[str]:
    """Return the targets, each with whether it is met."""
    by_name = {run.name: run for run in runs if not run.failed}
    if OURS not in by_name:
        return []
    ours = by_name[OURS]
    lines = []
    for name, target in TIME_TARGETS.items():
        pairs = ratios(runs, name)
        if pairs:
            lines.append(_verdict(f"time / {name}", statistics.median(pairs), target))
    if STOCK in by_name:
        lines.append(_verdict(f"peak / {STOCK}", ours.peak / by_name[STOCK].peak, PEAK_TARGET))
        if FLOOR in by_name and by_name[FLOOR].seconds:
            floor = statistics.median(
                a / b for a, b in zip(by_name[FLOOR].seconds, by_name[STOCK].seconds, strict=False)
            )
            lines.append(f"floor / {STOCK}: {floor:.3f}")
    if STOCK_COMPILED in by_name:
        compiled = by_name[STOCK_COMPILED]
        first = ours.first / compiled.first
        lines.append(_verdict(f"first step / {STOCK_COMPILED}", first, FIRST_TARGET))
        # `optimize` compiles some of its kernels, torch.compile begins with the first call.
        whole = (ours.build + ours.first) / (compiled.build + compiled.first)
        lines.append(f"made and first step / {STOCK_COMPILED}: {whole:.3f}")
    return lines


def _verdict(what: str, value: float, target: float) -> str:
    return f"{what}: {value:.3f}, target {target}: {'met' if value <= target else 'not met'}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
