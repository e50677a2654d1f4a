"""Writes the host's times as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.host.calls import LAYERS
from bench.paired import interval_of_median
from bench.peers.contenders import OURS, STOCK, STOCK_COMPILED

TARGETS = {"Llama": 0.45, "mixture of experts": 0.6}
"""Of stock compiled's time."""

REPLAY_TARGET = 6
"""Of an empty op's time, with as many tensors."""

LAUNCHES_TARGET = 60
"""Ours and torch's inside our ops, in a Llama layer's forward and backward."""


def section(model: str, layers: int, runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one model's steps. runs: by contender, `seconds` of each round and `launches`."""
    lines = [
        *(f"## {model}, {layers} layers", ""),
        "| | ms a step | launches: ours | torch's in our ops | torch's elsewhere |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, run in runs.items():
        seconds, launches = 1e3 * statistics.median(run["seconds"]), run["launches"]
        counts = [launches["triton"], _sum(launches["inside"]), _sum(launches["outside"])]
        lines.append(f"| {name} | {seconds:.2f} | " + " | ".join(map(str, counts)) + " |")
    lines.append("")
    for peer in (STOCK, STOCK_COMPILED):
        verdict = _verdict(model, peer, runs)
        lines.append(f"- time / {peer}: {_ratio(runs[OURS], runs[peer])}{verdict}")
    counts = _per_layer(runs[OURS], layers)
    text = " + ".join(f"{count:g}" for count in counts)
    few = _few(model, sum(counts))
    lines.append(f"- launches of ours + of torch inside our ops, a layer: {text}{few}")
    return [*lines, ""]


def _sum(counts: Mapping[str, int]) -> int:
    return sum(counts.values())


def _per_layer(ours: Mapping[str, Any], layers: int) -> tuple[float, float]:
    launches = ours["launches"]
    return launches["triton"] / layers, _sum(launches["inside"]) / layers


def ratios(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> list[float]:
    """Return the ratios of each round's seconds."""
    return [a / b for a, b in zip(ours["seconds"], peer["seconds"], strict=True)]


def _ratio(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> str:
    found = ratios(ours, peer)
    low, high = interval_of_median(found)
    return f"{statistics.median(found):.2f} ({low:.2f} to {high:.2f})"


def _verdict(model: str, peer: str, runs: Mapping[str, Mapping[str, Any]]) -> str:
    if peer != STOCK_COMPILED or model not in TARGETS:
        return ""
    met = statistics.median(ratios(runs[OURS], runs[peer])) <= TARGETS[model]
    return f", target {TARGETS[model]}: {'met' if met else 'not met'}"


def _few(model: str, each: float) -> str:
    if model != "Llama":
        return ""
    return f", target {LAUNCHES_TARGET}: {'met' if each <= LAUNCHES_TARGET else 'not met'}"


def calls_section(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the fused calls of a Llama block, in microseconds."""
    header = ["", "ours", "torch's", "µs", *LAYERS]
    lines = ["## Fused calls of a Llama block, without plans", "", _line(header)]
    lines.append(_line(["---", *["---:"] * (len(header) - 1)]))
    for each in calls:
        parts = [f"{each['layers'][name]:.0f}" for name in LAYERS]
        counts = [str(each["triton"]), str(each["torch"])]
        whole = f"{each['whole']:.0f}"
        lines.append(_line([f"{each['name']}, {each['direction']}", *counts, whole, *parts]))
    return [*lines, ""]


def replays_section(replays: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the same calls with plans, without a cost of launches."""
    lines = [
        *("## Fused calls replayed, beside an op in C++ that does nothing", ""),
        *(_line(["", "replayed µs", "empty µs", "ratio"]), _line(["---", *["---:"] * 3])),
    ]
    for each in replays:
        times = each["replayed"], each["empty"]
        cells = (*(f"{time:.1f}" for time in times), f"{times[0] / times[1]:.1f}")
        lines.append(_line([f"{each['name']}, {each['direction']}", *cells]))
    most = max(each["replayed"] / each["empty"] for each in replays)
    met = "met" if most <= REPLAY_TARGET else "not met"
    return [*lines, "", f"- at most {most:.1f}, target {REPLAY_TARGET}: {met}", ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
