"""Writes the results as Markdown: measurements and failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.device.op import BASELINE
from bench.peers.race import Run
from bench.peers.settings import Setting
from bench.peers.table import disagreement, section

Entry = dict[str, Any]


def _correctness(found: Entry) -> list[str]:
    counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "error", "skipped"))
    ended = "; stopped, out of time" if found["stopped"] else ""
    lines = [f"{counts}{ended}.", *(f"- {test}" for test in found["bad"])]
    return [*lines, f"pytest: {found['wrong']}"] if found["wrong"] else lines


def _race(found: Entry) -> list[str]:
    runs = [Run(**run) for run in found["runs"]]
    return section(Setting(**found["setting"]), runs, timed=found["timed"])[2:]


def _op(found: Entry) -> list[str]:
    lines = [f"failed: {found['failed']}", ""] if found["failed"] else []
    for result in found["results"]:
        where, times = "{direction}, M={m} N={n} K={k}".format(**result), result["ms"]
        if None in times.values():
            lines.append(f"- {where}: {len(times)} candidates ran, none was timed")
            continue
        lines += [f"| {where} | ms | of {BASELINE} |", "|---|---:|---:|"]
        for name, value in sorted(times.items(), key=lambda item: item[1]):
            lines.append(f"| {name} | {value:.3f} | {value / times[BASELINE]:.3f} |")
        lines.append("")
    return lines


def _plans(found: Entry) -> list[str]:
    lines = [f"failed: {found['failed']}", ""] if found["failed"] else []
    for result in found["results"]:
        calls, different = result["calls"], result["different"]
        lines.append(
            f"- {result['format']}: {calls - len(different)} of {calls} calls give the same bits, "
            f"{result['plans']} plans"
        )
        lines += [f"  - other bits: {each}" for each in different]
        lines += [f"  - {each}" for each in result["by Python"]]
        for name, value in result["microseconds"].items():
            lines.append(f"  - one call with {name}, forward and backward: {value:.0f} µs")
    return lines


_KINDS: dict[str, Callable[[Entry], list[str]]] = {
    "correctness": _correctness,
    "race": _race,
    "op": _op,
    "plans": _plans,
    "left out": lambda found: [found["why"]],
}


def told(title: str, found: Entry) -> list[str]:
    """Return one part as lines of Markdown."""
    note = [found["note"], ""] if "note" in found else []
    body = "\n".join([*note, *_KINDS[found["kind"]](found)])
    return [f"## {title}", "", *body.strip().splitlines(), ""]


def failures(found: Entry) -> list[str]:
    """Return what went wrong in a dry run."""
    match found["kind"]:
        case "correctness":
            stopped = ["pytest: out of time"] * found["stopped"]
            return [*found["bad"], *stopped, *filter(None, [found["wrong"]])]
        case "race":
            runs = [Run(**run) for run in found["runs"]]
            lost = [f"{run.name}: {run.failed}" for run in runs if run.failed]
            return [*lost, *disagreement(runs)]
        case "plans":
            wrong = [
                f"{each['format']}: other bits" for each in found["results"] if each["different"]
            ]
            return [*wrong, *filter(None, [found["failed"]])]
        case "op":
            return [found["failed"]] if found["failed"] else []
        case _:
            return [found["why"]]


def headline(record: Entry) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['card']}, {versions}, commit {record['commit']}"
