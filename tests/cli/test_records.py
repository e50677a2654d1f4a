"""`qlora-compile records`: what it shows and does, and every bad input in one line."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora_compile.cli.app import app
from qlora_compile.tuning import fingerprint as fingerprints
from qlora_compile.tuning.fingerprint import established
from qlora_compile.tuning.record import Record, key_digest, to_line
from qlora_compile.tuning.store import RecordStore
from tests.tuning.records import sample_fingerprint, sample_problem, sample_record


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
            ):
                assert told in text


def test_show_needs_one_key(stored: tuple[Record, Record]):
    assert "'xyz': no key starts with that; `qlora-compile records list`" in refused("show", "xyz")
    assert "2 keys start with that, pass more digits" in refused("show", "")


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
