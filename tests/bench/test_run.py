"""The command of the gate: what it writes, what it prints, how it ends."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench.static import run
from bench.static.shipped import Row
from tests.bench.rows import changed, full

APP = typer.Typer()
APP.command()(run.main)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "TARGETS", {"sm_90": None})
    return tmp_path


def ship(monkeypatch: pytest.MonkeyPatch, rows: Sequence[Row]) -> None:
    monkeypatch.setattr(run, "measure_all", lambda archs, kernels, jobs: (len(rows), iter(rows)))


def test_all_gates_met(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(monkeypatch, full())
    done = CliRunner().invoke(APP, [])
    assert done.exit_code == 0, done.output
    assert "0 not met" in done.output
    assert "# Compiled kernels" in (results / "static.md").read_text()


def test_a_spill_fails_the_command_and_is_reported(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(monkeypatch, [*full(), changed(spills=2)])
    done = CliRunner().invoke(APP, [])
    assert done.exit_code == 1
    assert "NOT MET sm_90 no spill, no stack: 2 spill instructions" in done.output
    assert "2 spill instructions" in (results / "static.md").read_text()


def test_a_part_is_printed_and_not_written(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(monkeypatch, [row for row in full() if row.kernel == "dequantize"])
    done = CliRunner().invoke(APP, ["--kernel", "dequantize", "--arch", "sm_90"])
    assert done.exit_code == 0, done.output
    assert "registers 128" in done.output
    assert list(results.iterdir()) == []


def test_unknown_names(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(monkeypatch, [])
    done = CliRunner().invoke(APP, ["--arch", "sm_70"])
    assert done.exit_code == 2
    assert "sm_70 is none of sm_90" in done.output
    done = CliRunner().invoke(APP, ["--kernel", "nothing"])
    assert done.exit_code == 2
    assert "no shipped launch of" in done.output
