"""Tuning processes that die, and many that tune at once."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from qlora_compile.tuning.record import from_line
from qlora_compile.tuning.store import RecordStore
from tests.examples import examples
from tests.tuning.conftest import Writers

KILLS = examples(50)


def test_killed_tuners_lose_no_finished_record(writers: Writers, tmp_path: Path) -> None:
    writers.start(f"tune_some {tmp_path} 1 1")  # measures the CPU too, once for all
    writers.until_dead()
    before = time.monotonic()
    writers.start(f"tune_some {tmp_path} 2 1")
    writers.until_dead()
    usual = time.monotonic() - before
    rng = random.Random(0)
    tuned = {1, 2}
    start = 3
    for _ in range(KILLS):
        [child] = writers.start(f"tune_until_killed {tmp_path} {start}")
        time.sleep(rng.uniform(0, 3 * usual))
        os.kill(child, signal.SIGKILL)
        said, codes = writers.until_dead()
        assert codes == [-signal.SIGKILL]
        tuned |= {int(size) for word, size in said if word == "tuned"}
        start = max(tuned) + 1
        lines = (tmp_path / "records.jsonl").read_text().splitlines()
        found = {from_line(line).problem.n for line in lines}
        assert tuned <= found <= tuned | {start}
        tuned |= found
        start = max(tuned) + 1
    assert len(tuned) > KILLS / 5


def test_eight_tuners_measure_each_problem_once(writers: Writers, tmp_path: Path) -> None:
    writers.start(f"tune_some {tmp_path} 1 1")
    writers.until_dead()
    count = 6
    writers.start(*[f"tune_some {tmp_path} 2 {count}"] * 8)
    said, codes = writers.until_dead()
    assert codes == [0] * 8
    assert sum(int(measured) for _, measured in said) == count
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert sorted(from_line(line).problem.n for line in lines) == list(range(1, count + 2))
    assert len(RecordStore(tmp_path).read()) == count + 1
