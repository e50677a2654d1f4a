"""The tuner: what it measures, what it finds, and what it will not choose."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from qlora_compile.kernels import registry, selection
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.registry import VARIANTS
from qlora_compile.kernels.selection import HANDFUL
from qlora_compile.kernels.selector import select
from qlora_compile.kernels.variants import native_adapter
from qlora_compile.kernels.variants.base import Variant
from qlora_compile.tuning import cpu_figures
from qlora_compile.tuning import tuner as module
from qlora_compile.tuning.caution import TRUSTING
from qlora_compile.tuning.errors import CandidateError, NoCorrectVariantError, TuningProcessError
from qlora_compile.tuning.fingerprint import established
from qlora_compile.tuning.isolated import IsolatedMeasurement
from qlora_compile.tuning.operands import operands
from qlora_compile.tuning.record import to_line
from qlora_compile.tuning.store import RecordFile, RecordStore
from qlora_compile.tuning.timings import Timing
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.tuning.warning import NotMeasuredWarning, RecordWarning, WrongResultWarning
from tests.tuning import odd_variants
from tests.tuning.records import real_problem, sample_record

PROBLEM = real_problem()


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is not measured for every test."""
    monkeypatch.setattr(module, "measured_cpu", lambda folder, caution: None)


def tuner(folder: Path, budget: float = 60.0, **options: bool) -> Tuner:
    return Tuner("test", RecordStore(folder), budget, each=0.01, **options)


def offer(monkeypatch: pytest.MonkeyPatch, *variants: Variant) -> None:
    monkeypatch.setattr(registry, "VARIANTS", variants)


def test_a_problem_is_measured_once_and_found_ever_after(tmp_path: Path) -> None:
    first = tuner(tmp_path)
    problems = [PROBLEM, replace(PROBLEM, direction="backward"), PROBLEM]
    told = []
    first.ensure(problems, lambda problem, choice: told.append((problem, choice)))
    assert first.measurements == 2
    assert [problem for problem, _ in told] == problems[:2]
    choice = first.selector.select(PROBLEM)
    assert choice.measured is not None
    assert choice == told[0][1]
    first.ensure(problems)
    assert first.measurements == 2
    second = tuner(tmp_path)
    second.ensure(problems)
    assert second.measurements == 0
    assert second.selector.select(PROBLEM) == choice


def test_a_record_tells_candidates_baseline_and_runner_up(tmp_path: Path) -> None:
    used = tuner(tmp_path)
    used.ensure([PROBLEM])
    record = RecordStore(tmp_path).find(PROBLEM, established("cpu"))
    assert record is not None
    assert 2 <= len(record.timings) <= HANDFUL + 1
    assert record.baseline is not None
    assert record.baseline in record.timings
    assert (record.baseline.variant, record.baseline.config) == ("dense", "whole float32")
    choice = used.selector.select(PROBLEM)
    told = choice.measured
    assert told is not None
    assert choice.seconds == record.winner.seconds
    assert (told.gain, told.margin) == (record.gain, record.margin)
    assert record.runner_up is not None
    assert told.runner_up == f"{record.runner_up.variant} {record.runner_up.config}"


def test_measuring_again_replaces_the_record(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    old = sample_record(PROBLEM, established("cpu"), seconds=123.0)
    store.append(old)
    again = tuner(tmp_path, again=True)
    again.ensure([PROBLEM])
    assert again.measurements == 1
    new = store.find(PROBLEM, established("cpu"))
    assert new is not None
    assert new.winner.seconds < 1


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (odd_variants.Wrong(), r"y is off by 1\.0e-02 of its norm, allowed [1-9]\.\de-07"),
        (odd_variants.Nan(), r"y is off by nan of its norm"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_wrong_numbers_are_never_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variant: Variant, reason: str
) -> None:
    offer(monkeypatch, variant, *VARIANTS)
    assert select(PROBLEM).variant is variant  # what the cost model would take
    used = tuner(tmp_path)
    with pytest.warns(
        WrongResultWarning,
        match=f"{variant.name} whole float32 is not used, wrong result: {reason}",
    ):
        used.ensure([PROBLEM])
    assert used.selector.select(PROBLEM).variant is not variant
    record = RecordStore(tmp_path).find(PROBLEM, established("cpu"))
    assert record is not None
    assert [name for name, _ in record.rejected] == [f"{variant.name} whole float32"]
    assert all(timing.variant != variant.name for timing in record.timings)


@pytest.mark.parametrize("m", [1, 63, 512, 2048])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_tail_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, direction: Direction, m: int
) -> None:
    """Of the rows only some are."""
    offer(monkeypatch, odd_variants.WrongAtTheEnd(), *VARIANTS)
    problem = replace(PROBLEM, direction=direction, m=m)
    wrong = "y" if direction == "forward" else "grad x"
    with pytest.warns(WrongResultWarning, match=f"wrong_at_the_end .* {wrong} is off by"):
        tuner(tmp_path).ensure([problem])


@pytest.mark.filterwarnings("ignore::qlora_compile.tuning.warning.WrongResultWarning")
def test_nothing_right_is_an_error_with_every_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, odd_variants.Wrong(), odd_variants.Nan())
    with pytest.raises(NoCorrectVariantError) as raised:
        tuner(tmp_path).ensure([PROBLEM])
    assert "wrong whole float32: wrong result: y is off by" in str(raised.value)
    assert "nan whole float32: wrong result: y is off by nan" in str(raised.value)
    assert RecordStore(tmp_path).read() == {}


def test_wrong_ones_do_not_hide_right_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However many the cost model prefers."""
    offer(monkeypatch, *(odd_variants.OutOfMemory() for _ in range(2 * HANDFUL)), *VARIANTS[1:])
    used = tuner(tmp_path)
    used.ensure([PROBLEM])
    assert used.selector.select(PROBLEM).variant is VARIANTS[1]


def test_out_of_memory_rejects_the_candidate_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, odd_variants.OutOfMemory(), *VARIANTS)
    used = tuner(tmp_path)
    used.ensure([PROBLEM])
    record = RecordStore(tmp_path).find(PROBLEM, established("cpu"))
    assert record is not None
    expected = "OutOfMemoryError: tried to allocate 1 PiB"
    assert record.rejected == (("out_of_memory whole float32", expected),)
    assert used.selector.select(PROBLEM).variant.name != "out_of_memory"


def test_when_nothing_can_run_the_cost_model_chooses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, odd_variants.OutOfMemory())
    used = Tuner("test", RecordStore(tmp_path), 60.0, each=None)
    message = "is chosen by the cost model, no candidate could be timed:\n  out_of_memory whole"
    with pytest.warns(NotMeasuredWarning, match=message):
        used.ensure([PROBLEM])
    assert used.measurements == 0
    assert used.selector.select(PROBLEM).measured is None
    used.refresh(60.0)
    offer(monkeypatch, *VARIANTS)
    used.ensure([PROBLEM])
    assert used.measurements == 1


def test_a_single_candidate_is_timed_only_on_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selection, "_HOPELESS", 0.0)
    unasked = tuner(tmp_path)
    unasked.ensure([PROBLEM])
    assert unasked.measurements == 0
    assert unasked.selector.select(PROBLEM).measured is None
    asked = Tuner("test", RecordStore(tmp_path), 60.0, each=None)
    asked.ensure([PROBLEM])
    assert asked.measurements == 1


@pytest.mark.usefixtures("fresh_figures")
def test_what_is_on_around_it_does_not_matter(tmp_path: Path) -> None:
    """The ops switch autocast off; a first call may come in inference mode."""
    problems = [PROBLEM, replace(PROBLEM, direction="backward")]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            cpu_figures.measured_cpu(tmp_path, caution=TRUSTING)
            tuner(tmp_path).ensure(problems)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(RecordStore(tmp_path).read()) == 2
    for record in RecordStore(tmp_path).read().values():
        assert not record.rejected


def test_what_was_wrong_is_not_modelled_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the right ones could not be timed."""
    offer(monkeypatch, odd_variants.Wrong(), odd_variants.OutOfMemory())
    used = tuner(tmp_path)
    assert used.selector.select(PROBLEM).variant.name == "wrong"
    with pytest.warns(NotMeasuredWarning), pytest.warns(WrongResultWarning):
        used.ensure([PROBLEM])
    assert used.selector.select(PROBLEM).variant.name == "out_of_memory"


def test_what_an_earlier_candidate_left_is_not_taken_for_a_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, *VARIANTS[:1], odd_variants.Forgetful())
    problem = replace(PROBLEM, keeps_low_rank=True, layout=PROBLEM.layout.with_rows(4))
    with pytest.warns(WrongResultWarning, match="forgetful .* low rank is off by nan"):
        tuner(tmp_path).ensure([problem])


def test_tritons_errors_reject_the_candidate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, odd_variants.TooLarge(), *VARIANTS)
    tuner(tmp_path).ensure([PROBLEM])
    [record] = RecordStore(tmp_path).read().values()
    [(name, reason)] = record.rejected
    assert name == "too_large whole float32"
    assert reason.startswith("OutOfResources: out of resource: shared memory")


def test_a_bug_in_another_process_is_told_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, odd_variants.IsolatedMistaken(), *VARIANTS)
    with pytest.raises(CandidateError, match=r"(?s)isolated_mistaken whole.*TypeError: a mistake"):
        tuner(tmp_path).ensure([PROBLEM])


def test_another_number_of_threads_is_measured_anew(tmp_path: Path) -> None:
    used = tuner(tmp_path)
    used.ensure([PROBLEM])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert used.selector.recorded(PROBLEM) is None
        used.ensure([PROBLEM])
    finally:
        torch.set_num_threads(threads)
    assert used.measurements == 2
    assert len(RecordStore(tmp_path).read()) == 2


def test_a_process_that_cannot_measure_costs_no_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora_compile.tuning.isolated._WORKER", "no_such_module")
    offer(monkeypatch, odd_variants.Crashing(), *VARIANTS)
    used = tuner(tmp_path)
    with pytest.warns(NotMeasuredWarning, match="exit status 1"):
        used.ensure([PROBLEM, replace(PROBLEM, layout=PROBLEM.layout.with_rows(8))])
    assert used.budget <= 0.0
    capfd.readouterr()


def test_a_bug_is_not_taken_for_a_slow_candidate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, odd_variants.Mistaken(), *VARIANTS)
    with pytest.raises(TypeError, match="a mistake"):
        tuner(tmp_path).ensure([PROBLEM])


def test_what_takes_its_process_down_costs_the_session_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = (odd_variants.Crashing(), odd_variants.CrashingLater(), odd_variants.FailingLater())
    odd += (odd_variants.Hanging(),)
    offer(monkeypatch, *odd, *VARIANTS)
    # A worker takes seconds to start where the machine is busy.
    monkeypatch.setattr(module, "_SHORTEST_LIMIT", 30.0)
    used = tuner(tmp_path, budget=1.0)
    used.ensure([PROBLEM])
    record = RecordStore(tmp_path).find(PROBLEM, established("cpu"))
    assert record is not None
    assert dict(record.rejected) == {
        "crashing whole float32": "it took its process down (SIGSEGV)",
        "crashing_later whole float32": "it took its process down (SIGABRT)",
        "failing_later whole float32": "it took its process down (exit status 1)",
        "hanging whole float32": "it did not return within 30 s",
    }
    assert used.selector.select(PROBLEM).variant in VARIANTS
    capfd.readouterr()


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_compile.tuning.isolated._WORKER", "no_such_module")
    with pytest.raises(TuningProcessError, match=r"exit status 1.*tune='model'"):
        IsolatedMeasurement().measure(PROBLEM, [select(PROBLEM)], 0.01)


def test_without_budget_nothing_is_measured(tmp_path: Path) -> None:
    used = tuner(tmp_path, budget=0.0)
    used.ensure([PROBLEM])
    assert used.measurements == 0
    assert used.selector.select(PROBLEM) == select(PROBLEM)


def test_a_budget_ends(tmp_path: Path) -> None:
    used = tuner(tmp_path, budget=1e-6)
    problems = [replace(PROBLEM, layout=PROBLEM.layout.with_rows(n)) for n in (8, 16, 24)]
    used.ensure(problems)
    assert used.measurements == 1
    assert [used.selector.recorded(p) is not None for p in problems] == [True, False, False]


def test_another_machines_record_is_never_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = established("cpu")
    for other in (
        replace(here, device="a stranger"),
        replace(here, kernels=tuple((name, "0" * 64) for name, _ in here.kernels)),
        replace(here, threads=here.threads + 1),
        replace(here, torch="2.0"),
    ):
        RecordStore(tmp_path).append(sample_record(PROBLEM, other))
    used = tuner(tmp_path)
    used.ensure([PROBLEM])
    assert used.measurements == 1
    monkeypatch.setattr(module, "fingerprint", lambda device: replace(here, torch="3.0"))
    later = tuner(tmp_path)
    later.ensure([PROBLEM])
    assert later.measurements == 1


@pytest.mark.parametrize("winner", [("gone", "-"), ("dense", "7k float32"), ("tail", "-")])
def test_a_record_of_what_is_not_offered_is_measured_anew(
    tmp_path: Path, winner: tuple[str, str]
) -> None:
    old = sample_record(PROBLEM, established("cpu"))
    first = Timing(*winner, old.winner.seconds, 0.0)
    RecordStore(tmp_path).append(replace(old, timings=(first, *old.timings[1:])))
    used = tuner(tmp_path)
    used.ensure([PROBLEM])
    assert used.measurements == 1


def test_a_record_of_an_earlier_version_is_measured_anew(tmp_path: Path) -> None:
    """Nothing says what else had the machine when it was made."""
    body = json.loads(to_line(sample_record(PROBLEM, established("cpu"))))
    del body["load"], body["advantage"]
    body["qlora_compile_record"] = 2
    (tmp_path / "records.jsonl").write_text(json.dumps(body, separators=(",", ":")) + "\n")
    used = tuner(tmp_path)
    with pytest.warns(RecordWarning, match="it is of version 2, this is 3.*records prune"):
        used.ensure([PROBLEM])
    assert used.measurements == 1
    assert len(RecordStore(tmp_path).read()) == 1


def test_what_has_no_fingerprint_is_measured_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "fingerprint", lambda device: None)
    used = tuner(tmp_path)
    used.ensure([PROBLEM])
    assert used.measurements == 1
    assert used.selector.select(PROBLEM).measured is not None
    assert RecordStore(tmp_path).read() == {}


def test_a_folder_that_cannot_be_written_warns_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    used = tuner(tmp_path / "file" / "cache")
    with pytest.warns(RecordWarning) as caught:
        used.ensure([PROBLEM, replace(PROBLEM, layout=PROBLEM.layout.with_rows(8))])
    assert len([w for w in caught if issubclass(w.category, RecordWarning)]) == 1
    assert used.measurements == 2
    assert used.selector.select(PROBLEM).measured is not None


def test_a_shipped_file_is_read_and_not_written(tmp_path: Path) -> None:
    tuner(tmp_path / "cache").ensure([PROBLEM])
    shipped = tmp_path / "shipped.jsonl"
    RecordStore(tmp_path / "cache").export(shipped, None)
    used = Tuner("test", RecordFile(shipped), 60.0, each=0.01)
    before = shipped.read_bytes()
    used.ensure([PROBLEM])
    assert used.measurements == 0
    used.ensure([replace(PROBLEM, layout=PROBLEM.layout.with_rows(8))])
    assert used.measurements == 1
    assert shipped.read_bytes() == before


@pytest.fixture
def fresh_figures() -> Iterator[None]:
    cpu_figures._known.clear()
    yield
    cpu_figures._known.clear()


@pytest.mark.usefixtures("fresh_figures")
def test_the_cpu_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = []

    def measure() -> cpu_figures.CpuModel:
        measured.append(replace(cpu_figures.CPU, bandwidth=1e9 + len(measured)))
        return measured[-1]

    monkeypatch.setattr(cpu_figures, "measure_cpu", measure)
    use = partial(cpu_figures.measured_cpu, caution=TRUSTING)
    assert use(tmp_path, measures=False) is None
    assert not measured
    assert [use(tmp_path) for _ in range(3)] == measured * 3
    assert len(measured) == 1
    cpu_figures._known.clear()
    assert use(tmp_path, measures=False) == measured[0]
    [kept] = tmp_path.glob("cpu-*.json")
    for damaged in (b"", b"[]", b"{}", kept.read_bytes()[:-9], b'{"name": 1}'):
        kept.write_bytes(damaged)
        cpu_figures._known.clear()
        assert use(tmp_path) == measured[-1]
    assert len(measured) == 6


def test_a_first_run_does_not_count() -> None:
    """It compiles."""
    waits = [0.2]

    def run() -> None:
        time.sleep(waits.pop() if waits else 0.001)

    assert 0.001 <= cpu_figures._best(run) < 0.1


def test_copies_are_the_same_numbers_elsewhere() -> None:
    problem = replace(PROBLEM, direction="backward")
    first = operands(
        Problem.of_group([problem, replace(problem, layout=problem.layout.with_rows(8))])
    )
    other = first.copied()
    for mine, theirs in zip([first.x, *first.grads], [other.x, *other.grads], strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    [(one, _), (two, _)] = other.group
    assert one.x is two.x


def test_a_call_is_measured_with_s_kept_where_that_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float32, as on a CPU without 16-bit products, a forward is faster without S.
    monkeypatch.setattr(native_adapter, "multiplies", lambda dtype: True)
    dtypes = dict.fromkeys(("x_dtype", "compute_dtype", "out_dtype"), torch.bfloat16)
    problem = replace(PROBLEM, m=256, layout=replace(PROBLEM.layout, shape=(256, 256)), **dtypes)
    used = tuner(tmp_path)
    used.ensure_calls([(problem, True), (problem, True)])
    for each in selection.problems_of_call(problem, trains=True):
        assert (used.selector.recorded(each) is not None) == each.keeps_low_rank
    assert used.measurements == 2
    assert used.selector.saves_low_rank(problem)
    # An evaluation keeps nothing.
    used.ensure_calls([(problem, False)])
    assert used.selector.recorded(problem) is not None


def test_decoding_and_dropout_are_measured_per_element() -> None:
    model = cpu_figures.measure_cpu()
    assert all(1e-12 < seconds < 1e-6 for seconds in (*model.decode, model.dropout))
    assert model.of(model.gemm, torch.float32) == model.gemm[1]
