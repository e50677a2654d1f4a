"""`qlora-compile explain --svg`, and the picture of it that README and documentation show."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from qlora_compile.chosen import Chosen
from qlora_compile.cli import explain
from qlora_compile.cli.app import app
from qlora_compile.report import Report, Site
from tests.docs.blocks import ROOT
from tests.test_equality import as_rewritten
from tests.toy_language_model import toy_llama

__all__ = ["as_rewritten"]

COMMITTED = (ROOT / "docs" / "explain.svg").read_text(encoding="utf-8")


def lines(picture: str) -> list[str]:
    """Return the title and the lines of a picture, from the top."""
    root = ElementTree.fromstring(picture)
    found: dict[str, str] = {}
    for each in root.iterfind(".//{*}text"):
        place = "title" if each.get("text-anchor") == "middle" else each.attrib["y"]
        text = (each.text or "").replace("\N{NO-BREAK SPACE}", " ")
        found[place] = f"{found.get(place, '')}  {text}".rstrip()
    return [line for line in found.values() if line]


def report(rows: list[str], notes: dict[str, str]) -> Report:
    """Return the report with `rows` in its table, and `notes` below it, by their numbers."""

    def noted(cell: str) -> tuple[str, str | None]:
        text, _, number = cell.rstrip(")").partition(" (")
        return text, notes[number] if number else None

    sites = []
    for row in rows:
        count, name, stored, n, k, rank, how = re.split(r" x |\s{2,}", row.strip())
        (format, origin), (variant, reason) = noted(stored), noted(how)
        by = Chosen(512, n, rank, variant, "-", False, 1.0, None, None, None)
        by = None if reason else by
        for number in range(int(count)):
            called = name.replace("*", str(number))
            shape = (format, int(n), int(k), int(rank), reason)
            sites.append(Site(called, not reason, *shape, by, by, origin=origin))
    return Report(tuple(sites))


def test_the_committed_picture_is_what_todays_command_draws_of_its_rows() -> None:
    title, _, _, *rest = lines(COMMITTED)
    rows = [line for line in rest if re.match(r" +\d+  ", line)]
    notes: dict[str, str] = dict(re.findall(r"^ *\((\d+)\) (.*)", "\n".join(rest), re.M))
    assert len(rows) > 5
    assert len(notes) > 1
    drawn = explain.picture(report(rows, notes), title.strip())
    assert lines(drawn) == lines(COMMITTED)


@pytest.mark.usefixtures("as_rewritten")
def test_svg_is_drawn_beside_what_is_printed(tmp_path: Path) -> None:
    toy_llama().save_pretrained(tmp_path)
    file = tmp_path / "new" / "explain.svg"
    given = ["explain", "--model", str(tmp_path), "--tune", "model", "--svg"]
    result = CliRunner().invoke(app, [*given, str(file)])
    assert result.exit_code == 0, result.output
    title, header, *_ = lines(COMMITTED)
    drawn = lines(file.read_text(encoding="utf-8"))
    assert drawn[0] == title.replace("demo", str(tmp_path))
    assert drawn[1].split() == header.split()
    assert "14 of 15 linears fused" in drawn[-2]
    assert "14 of 15 linears fused" in result.stdout


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for svg in (tmp_path / "file" / "explain.svg", tmp_path):
        result = CliRunner().invoke(app, ["explain", "--model", str(tmp_path), "--svg", str(svg)])
        assert result.exit_code == 2
        assert "error: cannot write to" in result.stderr
        assert len(result.stderr.splitlines()) == 1
