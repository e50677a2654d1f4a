"""Keeps the results of all cards in one file, in which a run replaces only its own parts."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.device.carried import CARRIED
from bench.device.report import headline, told
from bench.measured_on import measured_on
from bench.peers.race import ROOT

RESULTS = ROOT / "bench" / "results"
_KEY = ("card", "versions", "commit")

_HEAD = (
    *("# On GPUs", ""),
    "By `make device`: bfloat16 under autocast, NF4 doubly quantised, rank 16 on all linears, no",
    "dropout, AdamW, random weights, one batch over and over, steps in turn. Contenders are made",
    "together and, but for ours, take their first step together: these two times are of a busy",
    "machine, and later settings find the caches of earlier ones. Device s: what the kernels and",
    "copies of a step take. Peak and saved: bytes that a step holds at most, and from forward to",
    "backward, beyond weights, adapters and the optimiser's state; allocated: all of them at most.",
    "",
)


def where(commit: str | None) -> dict[str, Any]:
    """Return the card, versions and commit of results. commit: to use instead of git's."""
    known = measured_on()
    path = [*map(str, CARRIED.glob("*")), *sys.path]
    versions = known["versions"]
    for name in ("triton", "bitsandbytes", "unsloth"):
        for found in importlib.metadata.distributions(name=name, path=path):
            versions.setdefault(name, found.version)
    card = known["machine"].get("device", "no GPU")
    return {"card": card, "versions": versions, "commit": commit or _commit()}


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def merged(known: list[dict[str, Any]], record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `known` with the parts of `record`, which replace the same parts of the same card,
    versions and commit."""
    same = [one for one in known if all(one[key] == record[key] for key in _KEY)]
    parts = {title: found for one in [*same, record] for title, found in one["parts"].items()}
    return [*(one for one in known if one not in same), {**record, "parts": parts}]


def keep(record: dict[str, Any], folder: Path = RESULTS) -> None:
    """Merge `record` into the folder's device.json, and write device.md from it."""
    file = folder / "device.json"
    records = merged(json.loads(file.read_text()) if file.exists() else [], record)
    file.write_text(json.dumps(records, indent=1) + "\n")
    lines = list(_HEAD)
    for each in records:
        lines += [f"# {headline(each)}", ""]
        for title, found in each["parts"].items():
            lines += told(title, found)
    file.with_suffix(".md").write_text("\n".join(lines))
