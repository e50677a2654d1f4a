"""`qlora-compile records`: what it shows and does, and every bad input in one line."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora_compile.cli.app import app
from qlora_compile.kernels.device_model import CPU
from qlora_compile.tuning import cpu_figures
from qlora_compile.tuning import fingerprint as fingerprints
from qlora_compile.tuning.caution import CAREFUL
from qlora_compile.tuning.cpu_figures import CheckedFigures
from qlora_compile.tuning.fingerprint import established
from qlora_compile.tuning.load import Counters, Load
from qlora_compile.tuning.record import Record, key_digest, to_line
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.timings import Timing
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.tuning.warning import NotMeasuredWarning
from tests.tuning.records import real_problem, sample_fingerprint, sample_problem, sample_record


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def stored(folder: Path) -> tuple[Record, Record]:
    """A record of this machine and one of another kernel."""
    mine = sample_record(sample_problem(n=123), established("cpu"))
    stale = sample_record(sample_problem(n=456), sample_fingerprint(device="a stranger"))
    for record in (mine, stale):
        RecordStore(folder).append(record)
    return mine, stale


def run(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["records", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def refused(*words: object) -> str:
    error = run(*words, code=2).stderr
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    return error


def test_without_records_it_says_so(folder: Path):
    assert run("list").stdout == f"no records in {folder}\n"
    assert not folder.exists()


def test_the_list_shows_each_record_and_whether_it_fits(stored: tuple[Record, Record]):
    lines = run("list").stdout.splitlines()
    for record, fits in zip(stored, ("yes", "no"), strict=True):
        [line] = [line for line in lines if key_digest(record.key)[:8] in line]
        cells = re.split(r"  +", line)
        assert cells[1:] == [fits, "1.0000", "2.00", "1.25", "tail 64×64", str(record.problem)]
    assert lines[-1].startswith("2 records")


def test_show_tells_everything(stored: tuple[Record, Record]):
    for record in stored:
        digest = key_digest(record.key)
        for given in (digest, digest[:8].upper(), digest[:8]):
            text = run("show", given).stdout
            for told in (
                f"key {digest}",
                f"  layout: {record.problem.layout}",
                f"  device: {record.fingerprint.device}",
                *(f"{name} {digest}" for name, digest in record.fingerprint.kernels),
                "  fused 32×128, 4 warps: 1.2500 ms, 0.0250 ms",
                "  dense -: 2.0000 ms",
                "2.000 times, against the second: 1.250 times",
                "skinny -: takes up to 16 rows",
                record.measured_at,
                "choice, dense -: 1.500 to 2.250 times, 12 rounds",
                "  drift: 1.010",
                "  stolen: not known",
            ):
                assert told in text


def test_show_needs_one_key(stored: tuple[Record, Record]):
    assert "'xyz': no key starts with these digits; `qlora" in refused("show", "xyz")
    assert "2 keys start with these digits; pass more of them" in refused("show", "")


def test_records_go_from_one_machine_to_another(
    stored: tuple[Record, Record], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    mine, stale = stored
    assert run("export", "mine.jsonl").stdout == "1 records in mine.jsonl\n"
    assert "'mine.jsonl': the file exists" in refused("export", "mine.jsonl", "--all")
    assert (tmp_path / "mine.jsonl").read_text() == f"{to_line(mine)}\n"
    assert run("export", "mine.jsonl", "--overwrite").stdout.startswith("1 records")
    assert run("export", "all.jsonl", "--all").stdout.startswith("2 records")
    monkeypatch.setenv("QLORA_COMPILE_CACHE", str(tmp_path / "another"))
    assert run("merge", "mine.jsonl", "all.jsonl").stdout.startswith("2 records taken over")
    assert run("merge", "mine.jsonl", "all.jsonl").stdout.startswith("0 records taken over")
    both = {mine.key: mine, stale.key: stale}
    assert RecordStore(tmp_path / "another").read() == RecordStore(folder).read() == both


def test_prune_leaves_what_fits(stored: tuple[Record, Record], folder: Path):
    assert run("prune").stdout == f"1 lines removed from {folder}\n"
    assert list(RecordStore(folder).read().values()) == [stored[0]]


class TestCheck:
    """`records check`, with a measurement that takes a moment."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qlora_compile.tuning.tuner.measured_cpu", lambda folder, caution: None)

    def test_what_changed_is_said_and_kept(self, stored: tuple[Record, Record], folder: Path):
        problem = real_problem()
        timing = Timing("dense", "whole float32", 9.0, 0.0)
        slow = sample_record(problem, established("cpu"), timings=(timing,), baseline=timing)
        RecordStore(folder).append(slow)
        text = run("check").stdout
        [line] = [line for line in text.splitlines() if key_digest(slow.key)[:8] in line]
        after = RecordStore(folder).find(problem, established("cpu"))
        assert after is not None
        assert after.winner.seconds < 1
        if (after.winner.variant, after.winner.config) == ("dense", "whole float32"):
            assert line.endswith(": the same, 0.00 times the time")
        else:
            assert f": changed: {after.winner.variant} {after.winner.config} (" in line
            assert line.endswith(" times as fast as dense) in place of dense whole float32")
        # No version offers the choice of the sample record for its problem.
        assert "changed: " in text
        assert f"2 records of this machine in {folder}: 2 measured again, " in text
        stale = stored[1]
        assert RecordStore(folder).read()[stale.key] == stale

    def test_a_busy_machine_changes_nothing(
        self, stored: tuple[Record, Record], folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(Tuner, "caution", CAREFUL)
        monkeypatch.setattr(Counters, "load_since", lambda self, before: Load(others=1.5))
        monkeypatch.setattr("qlora_compile.tuning.tuner._APART", 0.0)
        before = RecordStore(folder).read()
        with pytest.warns(NotMeasuredWarning, match="machine was busy"):
            text = run("check").stdout
        assert "not measured: the machine was busy, other processes used 1.5 CPUs" in text
        assert text.splitlines()[-1].endswith(": 0 measured again, 0 changed")
        assert RecordStore(folder).read() == before

    def test_the_figures_of_the_cpu_are_checked_too(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        found = [
            CheckedFigures(CPU, {"gemm bfloat16": 3.0}),
            CheckedFigures(CPU, {}),
            CheckedFigures(None, {}, busy=True),
            CheckedFigures(None, {}),
        ]
        busy = "not measured, because the machine was busy"
        told = ("gemm bfloat16 now 3 times as large", "the same", busy, None)
        for figures, expected in zip(found, told, strict=True):
            monkeypatch.setattr(cpu_figures, "checked_cpu", lambda *_, each=figures: each)
            text = run("check").stdout
            if expected is None:
                assert "CPU's figures" not in text
            else:
                assert f"the CPU's figures: {expected}\n" in text

    def test_a_bad_budget_is_one_line(self, folder: Path):
        assert "--budget 'soon' is not a time" in refused("check", "--budget", "soon")


def test_without_a_fingerprint_nothing_is_pruned_or_exported(
    stored: tuple[Record, Record], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fingerprints, "CPUINFO", folder / "absent")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    for words in (("prune",), ("export", "mine.jsonl")):
        assert "'cpu' has no fingerprint: cannot read" in refused(*words)
    assert len(RecordStore(folder).read()) == 2
    assert " yes " not in run("list").stdout


def test_what_cannot_be_read_or_written_is_one_line(folder: Path):
    assert "'absent.jsonl': No such file" in refused("merge", "absent.jsonl")
    assert "none to export; tune first" in refused("export", "new.jsonl", "--all")
    folder.write_text("a file")
    assert "cache': File exists; make it a folder" in refused("prune")


def test_the_command_line_is_there_before_torch():
    code = "import sys, qlora_compile.cli.app; assert not {'torch', 'filelock'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
