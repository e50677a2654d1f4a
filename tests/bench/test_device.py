"""`make device`: its budget, its table, its results."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench.device import command, fifth, results
from bench.device.correctness import outcomes
from bench.device.op import BASELINE, measured
from bench.device.parts import PARTS, Part, Race, toy
from bench.device.race import race
from bench.device.report import failures, told
from bench.peers import contenders
from bench.peers.contenders import CONTENDERS, OURS, STOCK, Contender
from bench.peers.race import Process, Run, error_in
from bench.peers.settings import LLAMA_1B, Setting, base_model, data

SMALL = Setting(LLAMA_1B, 1, 8, layers=1, hidden=64, vocabulary=64)
APP = typer.Typer()
APP.command()(command.command)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Contenders of the given names that compute nothing."""

    def named(*names: str, **options: Any) -> tuple[str, ...]:
        for name in names:
            made = Contender(
                name, lambda model, setting: model, module="tests.bench.fake_worker", **options
            )
            monkeypatch.setitem(contenders.CONTENDERS, name, made)
        return names

    return named


def by_name(runs: Iterable[Run]) -> dict[str, Run]:
    return {run.name: run for run in runs}


def test_contenders_that_hang_or_fail_leave_the_others_their_steps(
    fake: Any, tmp_path: Path
) -> None:
    names = fake(OURS, STOCK, "hangs", "cannot be built", "breaks")
    runs = by_name(race(SMALL, names, 5, time.monotonic() + 10, tmp_path))
    assert [len(runs[name].seconds) for name in (OURS, STOCK)] == [4, 4]
    assert runs["hangs"].failed == "out of time"
    assert runs["cannot be built"].failed == "ImportError: no accelerator"
    assert runs["breaks"].failed == "RuntimeError: an illegal memory access"


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("a\nTraceback\n  File x\nValueError: no\n", "ValueError: no"),
        ("torch.x.InductorError: CppCompileError: C++\n\nCommand:\ng++\n", "torch.x.InductorError"),
        ("ValueError: one\n\nDuring handling\nKeyError: 'two'\nSet X=1 for more\n", "KeyError"),
        ("Killed\n", "Killed"),
        ("", "ended without a word"),
    ],
)
def test_the_error_is_found_among_what_follows_it(log: str, line: str) -> None:
    assert error_in(log).startswith(line)


def test_caches_lie_where_compilers_find_them(fake: Any, tmp_path: Path) -> None:
    names = fake("one, and + another")
    race(SMALL, names, 2, time.monotonic() + 5, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.isidentifier()


def test_a_race_ends_in_time(fake: Any, tmp_path: Path) -> None:
    names = fake(OURS, STOCK, "hangs later")
    until = time.monotonic() + 6
    runs = by_name(race(SMALL, names, 1_000_000, until, tmp_path))
    assert time.monotonic() < until + 3
    assert not runs[OURS].failed
    assert runs[OURS].seconds


def test_only_a_contender_that_needs_it_has_a_folder_on_its_path(fake: Any, tmp_path: Path) -> None:
    fake("with", folders=(tmp_path / "carried",))
    fake("without")
    found = {}
    for name in ("with", "without"):
        process = Process.of(name, SMALL, 1, tmp_path / name)
        found[name] = str(tmp_path / "carried") in process.receive()["path"]
        process.close()
    assert found == {"with": True, "without": False}


def test_a_package_that_is_nowhere_is_named(fake: Any, tmp_path: Path) -> None:
    names = fake("lacking", needs="no_such_package")
    (run,) = race(SMALL, names, 2, time.monotonic() + 5, tmp_path)
    assert run.failed == "no_such_package is not installed: make device-wheels"


def entry(*runs: Run, timed: bool = True) -> dict[str, Any]:
    found = [vars(run) for run in runs]
    return {"kind": "race", "setting": vars(SMALL), "timed": timed, "runs": found}


def trained(name: str, loss: float, **more: Any) -> Run:
    return Run(name, peak=1, seconds=[0.123] * 3, losses=[loss] * 3, **more)


def test_speeds_stand_beside_the_error_of_a_contender_that_failed() -> None:
    failed = Run("Unsloth", failed="no accelerator")
    on_gpu = {"device_seconds": 0.0815, "allocated": 7_000_000, "launched": 77}
    text = "\n".join(
        told("race", entry(trained(OURS, 3.0, **on_gpu), trained(STOCK, 3.01), failed))
    )
    for shown in ("0.1230", "failed: no accelerator", "0.08150", "| 7 |", "| 77 |"):
        assert shown in text


@pytest.mark.parametrize(("loss", "timed"), [(3.3, True), (math.nan, True), (3.0, False)])
def test_no_speed_where_losses_disagree_or_nothing_was_timed(loss: float, timed: bool) -> None:
    runs = (trained(OURS, loss, device_seconds=0.0815), trained(STOCK, 3.0))
    text = "\n".join(told("race", entry(*runs, timed=timed)))
    assert "0.1230" not in text
    assert "0.08150" not in text


KEYS = st.fixed_dictionaries(
    {
        "card": st.sampled_from(["H100", "H200"]),
        "versions": st.sampled_from([{"torch": "1"}, {"torch": "2"}]),
        "commit": st.sampled_from(["a", "b"]),
    }
)


@given(st.lists(st.tuples(KEYS, st.dictionaries(st.sampled_from("xyz"), st.integers()))))
def test_a_run_replaces_its_own_parts_alone(runs: list[tuple[dict[str, Any], Any]]) -> None:
    records: list[dict[str, Any]] = []
    expected: dict[str, dict[str, int]] = {}
    for key, parts in runs:
        records = results.merged(records, {**key, "parts": parts})
        expected.setdefault(json.dumps(key, sort_keys=True), {}).update(parts)
    keys = [json.dumps({k: each[k] for k in results._KEY}, sort_keys=True) for each in records]
    found = {key: each["parts"] for key, each in zip(keys, records, strict=True)}
    assert len(found) == len(records)
    assert found == expected


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (entry(trained(OURS, 3.0), trained(STOCK, 3.0)), []),
        (
            entry(trained(OURS, 3.0), trained(STOCK, 3.0), Run("Unsloth", failed="x")),
            ["Unsloth: x"],
        ),
        (entry(trained(OURS, 4.0), trained(STOCK, 3.0)), ["losses are 33.3% from"]),
        ({"kind": "correctness", **outcomes("a.py::b PASSED", 0)}, []),
        ({"kind": "correctness", **outcomes("a.py::b FAILED", 1)}, ["a.py::b"]),
        ({"kind": "correctness", **outcomes("a.py::b PASSED", None)}, ["out of time"]),
        ({"kind": "correctness", **outcomes("no such option", 4)}, ["no such option"]),
        ({"kind": "op", "results": [], "failed": ""}, []),
        ({"kind": "op", "results": [], "failed": "killed"}, ["killed"]),
        ({"kind": "left out", "why": "not begun"}, ["not begun"]),
    ],
)
def test_a_dry_run_fails_for_whatever_fails(found: dict[str, Any], why: list[str]) -> None:
    wrong = failures(found)
    assert len(wrong) == len(why)
    assert all(part in line for part, line in zip(why, wrong, strict=True))


def test_results_are_told_by_card(tmp_path: Path) -> None:
    for card in ("NVIDIA H100", "NVIDIA H200", "NVIDIA H100"):
        parts = {"race": entry(trained(OURS, 3.0), trained(STOCK, 3.0))}
        results.keep({"card": card, "versions": {}, "commit": "a", "parts": parts}, tmp_path)
    text = (tmp_path / "device.md").read_text()
    assert [text.count(card) for card in ("NVIDIA H100", "NVIDIA H200")] == [1, 1]


def test_the_committed_table_is_that_of_the_results(tmp_path: Path) -> None:
    for record in json.loads((results.RESULTS / "device.json").read_text()):
        results.keep(record, tmp_path)
    for name in ("device.json", "device.md"):
        assert (tmp_path / name).read_text() == (results.RESULTS / name).read_text()


def test_a_fifth_is_disjoint_from_the_others_and_none_is_lost() -> None:
    chosen: list[int] = []
    for number in range(5):
        items: Any = list(range(13))
        hook = SimpleNamespace(pytest_deselected=lambda items: None)
        options = {"--fifth": number}
        config: Any = SimpleNamespace(getoption=options.__getitem__, hook=hook)
        fifth.pytest_collection_modifyitems(config, items)
        chosen += items
    assert sorted(chosen) == list(range(13))


def test_outcomes_are_counted_when_pytest_was_stopped_too() -> None:
    output = (
        "tests/a.py::one[x - y] PASSED  [ 20%]\ntests/a.py::two FAILED [ 40%]\n"
        "tests/a.py::three ERROR\ntests/a.py::four SKIPPED (why)\ntests/a.py::five "
    )
    text = "\n".join(told("tests", {"kind": "correctness", **outcomes(output, None)}))
    assert "1 passed, 1 failed, 1 error, 1 skipped; stopped, out of time." in text
    assert "- tests/a.py::two" in text
    assert outcomes("no such option", 4)["wrong"] == "no such option"


def test_the_op_runs_every_candidate_on_a_cpu() -> None:
    for direction in ("forward", "backward"):
        found = measured(8, 128, 64, direction, "cpu")
        assert BASELINE in found
        assert any(name.startswith("dense") for name in found)
        assert set(found.values()) == {None}


@pytest.mark.parametrize("part", [p for p in PARTS if isinstance(p, Race)], ids=str)
def test_a_toy_is_the_same_kind_of_model_on_the_cpu(part: Race) -> None:
    assert set(part.names) <= CONTENDERS.keys()
    small = toy(part)
    assert isinstance(small, Race)
    assert small.setting.device == "cpu"
    assert not small.timed
    model, (ids,) = base_model(small.setting), data(small.setting, 1)
    assert model.config.model_type == ("qwen3_moe" if "Qwen" in str(part.setting) else "llama")
    assert model.is_gradient_checkpointing == part.setting.checkpointing
    assert math.isfinite(model(input_ids=ids, labels=ids).loss)


class Clock:
    """A clock that only parts move."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Slow(Part):
    """Takes as long as it may."""

    least, share = 60.0, 0.5

    def __init__(self, title: str, clock: Clock) -> None:
        self._title, self.clock = title, clock

    @property
    def title(self) -> str:
        return self._title

    def run(self, until: float, folder: Path) -> dict[str, Any]:
        taken, self.clock.now = until - self.clock.now, until
        return {"kind": "left out", "why": f"took {taken:.0f} s"}


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (300, ["took 147 s", "took 74 s", "took 60 s", "took 14 s"]),
        (100, ["took 60 s", "took 34 s", "not begun: out of time", "not begun: out of time"]),
        (60, ["took 54 s", *["not begun: out of time"] * 3]),
        (1, ["not begun: out of time"] * 4),
    ],
)
def test_the_command_ends_in_time_with_a_table(
    seconds: int, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    parts = tuple(Slow(f"part {number}", clock) for number in range(4))
    for name, value in {"PARTS": parts, "BEGUN": clock.now, "time": clock}.items():
        monkeypatch.setattr(command, name, value)
    done = CliRunner().invoke(APP, ["--dry", "--seconds", str(seconds)])
    assert clock.now <= 100 + max(seconds - command.MARGIN, 0)
    table = done.stdout[done.stdout.index("# no GPU") :]
    found = [line for line in table.splitlines() if line and not line.startswith("#")]
    assert found == told
