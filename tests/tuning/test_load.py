"""Load: what the system's counters tell, beside processes that really use the machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_compile.kernels.device_model import CPU
from qlora_compile.kernels.selection import candidates, shortlist
from qlora_compile.tuning import load as module
from qlora_compile.tuning import rounds
from qlora_compile.tuning import tuner as tuners
from qlora_compile.tuning.caution import CAREFUL
from qlora_compile.tuning.load import Counters, Load, usable_cpus
from qlora_compile.tuning.measure import measure
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.tuning.warning import NotMeasuredWarning
from tests.tuning.records import real_problem

linux = pytest.mark.skipif(not module.PROC_STAT.exists(), reason="reads Linux's /proc/stat")


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """That many processes that never rest."""
    loop = "print(flush=True)\nwhile True: pass"
    command = [sys.executable, "-c", loop]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def all_cpus() -> Iterator[None]:
    """torch has a thread for each CPU, so that none is free for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(usable_cpus()))
    yield
    torch.set_num_threads(threads)


@linux
@pytest.mark.usefixtures("all_cpus")
def test_busy_processes_are_seen() -> None:
    with busy_processes(2 * len(usable_cpus())):
        before = Counters.now()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
        load = Counters.now().load_since(before)
    assert load.others is not None
    assert load.others > CAREFUL.others
    disturbance = load.disturbance(CAREFUL)
    assert disturbance is not None
    assert disturbance.startswith("other processes used")


@linux
@pytest.mark.usefixtures("all_cpus")
def test_beside_busy_processes_nothing_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuners, "measured_cpu", lambda folder, caution: None)
    tuner = Tuner("busy", RecordStore(tmp_path), 60.0, each=0.2)
    tuner.caution = replace(CAREFUL, runs=1)
    problem = real_problem(m=256)
    with (
        busy_processes(2 * len(usable_cpus())),
        pytest.warns(NotMeasuredWarning, match="the machine was busy, "),
    ):
        tuner.ensure([problem])
    assert RecordStore(tmp_path).read() == {}
    reason = tuner.selector.unmeasured(problem)
    assert reason is not None
    assert reason.startswith("the machine was busy, ")


def test_the_counters_watch_no_less_than_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if every candidate but one is dropped at once, as other work may have it."""
    watched: list[float] = []

    def load_since(after: Counters, before: Counters) -> Load:
        watched.append(after.wall - before.wall)
        return Load()

    monkeypatch.setattr(Counters, "load_since", load_since)
    monkeypatch.setattr(rounds, "_WORSE", {2: 0.0})
    problem = real_problem(m=256)
    tried = shortlist(candidates(problem, CPU), problem)
    assert len(tried) > 1
    measure(problem, tried, seconds=0.2)
    assert watched[0] >= rounds.WATCHED


def counters(**changed: float | None) -> Counters:
    values = {"wall": 100.0, "own": 10.0, "cpus": 4, "busy": 50.0, "stolen": 1.0, "preemptions": 7}
    return Counters(**{**values, **changed})  # pyright: ignore[reportArgumentType]


def test_what_threads_leave_free_others_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    later = counters(wall=110.0, own=30.0, busy=80.0)  # 20 s of our own, 10 s of others
    assert later.load_since(counters()).others == pytest.approx(0.0)
    later = counters(wall=110.0, own=30.0, busy=85.0)
    assert later.load_since(counters()).others == pytest.approx(0.5, abs=0.01)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert later.load_since(counters()).others == pytest.approx(1.5, abs=0.01)


def test_stolen_time_is_a_part_of_all_cpus() -> None:
    later = counters(wall=110.0, busy=51.0, stolen=9.0)
    assert later.load_since(counters()).stolen == pytest.approx(0.2, abs=0.01)
    assert (
        later.load_since(counters()).disturbance(CAREFUL) == "the hypervisor took 20% of the CPUs"
    )


def test_preemptions_count_by_time_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    later = counters(wall=110.0, own=12.0, preemptions=410)
    assert later.load_since(counters()).preemptions == pytest.approx(200.0)
    # A few happen in any run, however short.
    assert counters(wall=100.1, own=10.001, preemptions=10).load_since(counters()).preemptions == 0
    # More threads than CPUs preempt each other.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert later.load_since(counters()).preemptions is None


@pytest.mark.parametrize("text", [None, "", "cpu 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n"])
def test_what_the_system_does_not_tell_disturbs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    """No Linux, or a sandbox that shows zeros."""
    path = tmp_path / "stat"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(module, "PROC_STAT", path)
    monkeypatch.setattr(module, "resource", None)
    before = Counters.now()
    load = Counters.now().load_since(before)
    assert (load.others, load.stolen, load.preemptions) == (None, None, None)
    assert load.disturbance(CAREFUL) is None


def test_only_the_cpus_that_may_be_used_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "stat"
    path.write_text(
        "cpu  1 1 1 1 1 1 1 1 0 0\n"
        "cpu0 100 200 300 1000 50 10 20 30 7 7\n"
        "cpu10 900 0 0 1000 0 0 0 500 0 0\n"
        "intr 5\n"
    )
    monkeypatch.setattr(module, "PROC_STAT", path)
    monkeypatch.setattr(module, "_ticks_per_second", lambda: 100)
    monkeypatch.setattr(module, "usable_cpus", lambda: frozenset({0}))
    now = Counters.now()
    assert (now.cpus, now.busy, now.stolen) == (1, 6.3, 0.3)
