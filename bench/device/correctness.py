"""Runs a part of the tests that need a device, while there is time."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from bench.peers.race import ROOT

_OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", re.MULTILINE)


def correctness(until: float, fifth: int) -> dict[str, Any]:
    """Return the outcomes of a fifth of `pytest -m gpu`. until: the time, by time.monotonic, at
    which pytest is stopped; tests that ended before count."""
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider"]
    command += ["-p", "bench.device.fifth", f"--fifth={fifth}", "-m", "gpu"]
    # A file that needs a package which is missing here must not keep the others from running.
    command.append("--continue-on-collection-errors")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        return outcomes(output.read(), code)


def outcomes(output: str, code: int | None) -> dict[str, Any]:
    """Return the outcomes in pytest's output. code: None if pytest was stopped."""
    found = _OUTCOME.findall(output)
    counted = {
        name: sum(outcome == name.upper() for _, outcome in found)
        for name in ("passed", "failed", "error", "skipped")
    }
    bad = [test for test, outcome in found if outcome in ("FAILED", "ERROR")]
    # Neither "all passed" nor "some failed": what stopped pytest stands at the end.
    wrong = (output.strip().splitlines() or ["no output"])[-1] if code not in (None, 0, 1) else ""
    return {**counted, "bad": bad, "stopped": code is None, "wrong": wrong}


def told(found: dict[str, Any]) -> list[str]:
    """Return the result of `correctness` as lines of Markdown."""
    counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "error", "skipped"))
    ended = "; stopped there, out of time" if found["stopped"] else ""
    lines = [f"{counts}{ended}.", *(f"- {test}" for test in found["bad"])]
    return [*lines, f"pytest: {found['wrong']}"] if found["wrong"] else lines
