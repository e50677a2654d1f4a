"""Records that real calls contradict: when they are dropped, and from where."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_compile.kernels.call_times import SEVERAL, CallTimes
from qlora_compile.kernels.device_model import CPU, CpuModel
from qlora_compile.kernels.selector import select
from qlora_compile.tuning import cpu_figures, modes
from qlora_compile.tuning import tuner as module
from qlora_compile.tuning.caution import CAREFUL, TRUSTING, Caution
from qlora_compile.tuning.cpu_figures import CheckedFigures, checked_cpu
from qlora_compile.tuning.fingerprint import established
from qlora_compile.tuning.load import Counters, Load
from qlora_compile.tuning.record import Record
from qlora_compile.tuning.refuted import RefutedRecords
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.timings import Timing
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.tuning.warning import RecordWarning
from tests.tuning.records import real_problem, sample_record

PROBLEM = real_problem()


def spoilt(seconds: float) -> Record:
    """Return a record that says that the choice takes so long."""
    timing = Timing("dense", "whole float32", seconds, 0.0)
    return sample_record(PROBLEM, established("cpu"), timings=(timing,), baseline=timing)


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured_cpu", lambda folder, caution: None)
    monkeypatch.setattr(module, "checked_cpu", lambda folder, caution: CheckedFigures(None, {}))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> dict[str, Load]:
    """What the counters of the system tell."""
    told = {"load": Load(others=0.0)}
    monkeypatch.setattr(Counters, "load_since", lambda self, before: told["load"])
    return told


def call(tuner: Tuner, seconds: float, times: int = SEVERAL) -> None:
    """Timed calls of the problem that take so long, and the next call of a region."""
    clock = [0.0]
    tuner.selector._times._clock = lambda: clock[0]
    for _ in range(times):
        choice = tuner.selector.select(PROBLEM)
        with tuner.selector._times.timing(PROBLEM, choice, PROBLEM.m):
            clock[0] += seconds
    tuner.ensure_missed()


def tuner_over(folder: Path, record: Record, budget: float = 60.0) -> Tuner:
    RecordStore(folder).append(record)
    tuner = Tuner("refuted", RecordStore(folder), budget, each=0.01)
    tuner.ensure([PROBLEM])
    assert tuner.measurements == 0
    assert tuner.selector.select(PROBLEM).seconds == record.winner.seconds
    return tuner


def test_a_record_made_beside_other_work_is_dropped(tmp_path: Path) -> None:
    """Calls are faster than it says, which no load of today explains."""
    record = spoilt(1.0)
    tuner = tuner_over(tmp_path, record)
    call(tuner, 0.3, SEVERAL - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(tuner, 0.6)
    with pytest.warns(RecordWarning, match=r"dense whole float32 .* take 0\.3 times as long as it"):
        call(tuner, 0.3)
    assert RecordStore(tmp_path).read() == {}
    assert tuner.selector.look_up(PROBLEM) == select(PROBLEM)
    tuner.selector.select(PROBLEM)
    tuner.ensure_missed()
    assert tuner.measurements == 1
    [after] = RecordStore(tmp_path).read().values()
    assert after.winner.seconds < 0.1


def test_slow_calls_beside_other_work_refute_nothing(tmp_path: Path, load: dict[str, Load]) -> None:
    record = spoilt(1e-3)
    tuner = tuner_over(tmp_path, record)
    tuner.caution = CAREFUL
    load["load"] = Load(others=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            call(tuner, 5e-3)
    assert list(RecordStore(tmp_path).read().values()) == [record]
    load["load"] = Load(others=0.1)
    tuner.caution = TRUSTING
    call(tuner, 5e-3)
    with pytest.warns(RecordWarning, match=r"calls take 5 times as long"):
        call(tuner, 5e-3)
    assert RecordStore(tmp_path).read() == {}


def test_slow_calls_on_a_quiet_machine_have_to_repeat(
    tmp_path: Path, load: dict[str, Load]
) -> None:
    tuner = tuner_over(tmp_path, spoilt(1e-3))
    call(tuner, 5e-3)
    assert len(RecordStore(tmp_path).read()) == 1
    with pytest.warns(RecordWarning, match="is dropped"):
        call(tuner, 5e-3)
    assert RecordStore(tmp_path).read() == {}


def test_a_problem_is_refuted_once(tmp_path: Path) -> None:
    tuner = tuner_over(tmp_path, spoilt(1.0))
    with pytest.warns(RecordWarning, match="is dropped"):
        call(tuner, 0.1)
    tuner.selector.select(PROBLEM)
    tuner.ensure_missed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(tuner, 1e-9)
    assert len(RecordStore(tmp_path).read()) == 1


def test_without_budget_the_record_stays_and_is_not_used(tmp_path: Path) -> None:
    """As with tune="off", or the path of shipped records."""
    record = spoilt(1.0)
    tuner = tuner_over(tmp_path, record, budget=0.0)
    with pytest.warns(RecordWarning, match="is dropped"):
        call(tuner, 0.1)
    tuner.selector.select(PROBLEM)
    tuner.ensure_missed()
    assert tuner.selector.look_up(PROBLEM) == select(PROBLEM)
    assert list(RecordStore(tmp_path).read().values()) == [record]


def test_a_record_is_discarded_wherever_it_is_stored(tmp_path: Path) -> None:
    old, new = spoilt(1.0), replace(spoilt(2.0), measured_at="2026-02-01T12:00:00+00:00")
    store = RecordStore(tmp_path)
    store.append(old)
    (tmp_path / "records.jsonl").rename(tmp_path / "shipped.jsonl")
    store.append(new)
    other = spoilt(3.0)
    store.discard(other)
    assert store.find(PROBLEM, established("cpu")) == new
    store.discard(new)
    assert store.find(PROBLEM, established("cpu")) == old
    store.discard(old)
    assert RecordStore(tmp_path).read() == {}


def test_calls_of_other_threads_counts_and_misses_are_left_alone(tmp_path: Path) -> None:
    tuner = Tuner("refuted", RecordStore(tmp_path), 0.0)
    assert isinstance(tuner.selector._times, CallTimes)
    call(tuner, 99.0, 99)
    assert tuner.selector.take_contradictions() == {}


class TestFigures:
    """The stored figures of the CPU."""

    @pytest.fixture
    def measured(self, monkeypatch: pytest.MonkeyPatch, load: dict[str, Load]) -> list[CpuModel]:
        """What the next measurements result in, in turn; the last one stays."""
        monkeypatch.setattr(cpu_figures, "_known", {})
        found = [CPU]
        take = lambda: found.pop(0) if len(found) > 1 else found[0]  # noqa: E731
        monkeypatch.setattr(cpu_figures, "measure_cpu", take)
        monkeypatch.setattr(cpu_figures, "builds", lambda: [])
        return found

    def test_busy_figures_are_not_kept(
        self, tmp_path: Path, measured: list[CpuModel], load: dict[str, Load]
    ) -> None:
        load["load"] = Load(others=1.5)
        measured[:] = [CPU] * (cpu_figures._ATTEMPTS + 1)
        assert cpu_figures.measured_cpu(tmp_path) is None
        assert len(measured) == 1
        assert not list(tmp_path.iterdir())
        load["load"] = Load(others=0.0)
        # A new process measures them.
        cpu_figures._known.clear()
        assert cpu_figures.measured_cpu(tmp_path) == CPU

    @pytest.mark.usefixtures("measured")
    def test_what_they_need_is_built_beforehand_until_they_are_stored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build = lambda: None  # noqa: E731
        monkeypatch.setattr(modes, "cache_folder", lambda: tmp_path)
        assert modes.builds_for_measuring("auto") == []
        monkeypatch.setattr(cpu_figures, "builds", lambda: [build])
        assert modes.builds_for_measuring("auto") == [build]
        for other in ("off", "model", str(tmp_path), None):
            assert modes.builds_for_measuring(other) == []
        assert cpu_figures.measured_cpu(tmp_path) == CPU
        assert modes.builds_for_measuring("auto") == []

    def test_figures_are_replaced_if_off_by_half(
        self, tmp_path: Path, measured: list[CpuModel], load: dict[str, Load]
    ) -> None:
        assert checked_cpu(tmp_path, CAREFUL) == CheckedFigures(None, {})
        assert cpu_figures.measured_cpu(tmp_path) == CPU
        measured[:] = [replace(CPU, bandwidth=1.9 * CPU.bandwidth)]
        assert checked_cpu(tmp_path, CAREFUL) == CheckedFigures(CPU, {})
        load["load"] = Load(others=1.5)
        assert checked_cpu(tmp_path, CAREFUL) == CheckedFigures(None, {}, busy=True)
        load["load"] = Load()
        gemm = (*CPU.gemm[:2], 3 * CPU.gemm[2], CPU.gemm[3])
        measured[:] = [replace(CPU, gemm=gemm, operator=CPU.operator / 4)]
        found = checked_cpu(tmp_path, CAREFUL)
        assert found.model == measured[0]
        assert found.changed == pytest.approx({"gemm bfloat16": 3.0, "operator": 0.25})
        assert cpu_figures.measured_cpu(tmp_path) == measured[0]
        cpu_figures._known.clear()
        assert cpu_figures.measured_cpu(tmp_path, measures=False) == measured[0]

    def test_a_refuted_record_has_them_checked(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Once in a process: each check takes a fraction of a second of training."""
        fast = replace(CPU, bandwidth=1e12)
        asked = []

        def check(folder: Path, caution: Caution) -> CheckedFigures:
            asked.append(folder)
            return CheckedFigures(fast, {"bandwidth": 9.0})

        monkeypatch.setattr(module, "checked_cpu", check)
        tuner = tuner_over(tmp_path, spoilt(1.0))
        with pytest.warns(RecordWarning, match="is dropped"):
            call(tuner, 0.1)
        assert tuner.selector.cpu == fast
        tuner._refuted_records = RefutedRecords()
        tuner.selector.select(PROBLEM)
        tuner.ensure_missed()
        with pytest.warns(RecordWarning, match="is dropped"):
            call(tuner, 1e-9)
        assert asked == [tmp_path]
