"""Waiting ends with the job, with what is waited for, or where the job no longer works."""

import os
import sys
from pathlib import Path

import pytest

from tests.waiting import job, runs

if not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists():
    pytest.skip("this system does not list the children of a process", allow_module_level=True)


def python(script: str) -> list[str]:
    return [sys.executable, "-S", "-c", script]


STARTS = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {!r}])"


def test_a_job_that_works_is_waited_for_to_its_end() -> None:
    script = "import time; print('works')\nwhile time.process_time() < 3: pass"
    with job(python(STARTS.format(script))) as started:
        assert started.wait() == "works\n"
        assert started.process.returncode == 0


@pytest.mark.parametrize(
    ("script", "limits", "expected"),
    [
        ("import time; time.sleep(600)", {"least": 0.1}, "it hangs\nbegins"),
        ("while True: pass", {"least": 0.0, "most": 1.0}, "it turns in a circle\nbegins"),
    ],
)
def test_a_job_that_no_longer_works_is_ended(
    script: str, limits: dict[str, float], expected: str
) -> None:
    with job(python(STARTS.format(f"print('begins', flush=True)\n{script}"))) as started:
        started.wait_until(lambda: bool(started.said()))
        with pytest.raises(AssertionError, match=expected):
            started.wait_until(started.ended, looks=10, **limits)
        [child] = started.children()
    assert not runs(started.process.pid)
    assert not runs(child)


def test_a_job_that_ends_before_what_is_waited_for() -> None:
    with job(python("import sys; sys.exit('stops')")) as started:
        with pytest.raises(AssertionError, match=r"too early\nstops"):
            started.wait_until(lambda: False)
        assert started.process.returncode == 1
