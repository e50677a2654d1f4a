"""The table of docs/checkpoints.md names every source and library, and tests that exist."""

import re

from qlora_compile.hf.bases.registry import BASES
from qlora_compile.hf.checkpoints.sources import SOURCES
from qlora_compile.kernels.registry import FORMATS
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| Source")
]
LEGEND = dict(re.findall(r"^- (\w): `([^`]+)`", PAGE, re.MULTILINE))


def test_every_source_and_every_library_has_a_row() -> None:
    methods = {method for row in ROWS for method in re.findall(r"`([^`]+)`", row[1])}
    assert methods == {source.method for source in SOURCES}
    adopted = " ".join(row[0] for row in ROWS if row[3].startswith("yes")).lower()
    for base in BASES:
        assert base.library.lower().split()[-1] in adopted, base.library


def test_every_cell_is_a_test_or_a_reason() -> None:
    assert len(ROWS) >= len(SOURCES)
    for row in ROWS:
        assert len(row) == 7, row
        for cell in row[3:]:
            found = re.match(r"yes \((\w)\)", cell)
            if found is None:
                assert re.match(r"no: \w{3,}", cell), cell
                continue
            for path in re.findall(r"tests/[\w/]+\.py", LEGEND[found[1]]):
                assert (ROOT / path).is_file(), path


def test_every_format_is_one_of_ours() -> None:
    known = {each.name for each in FORMATS}
    for row in ROWS:
        assert row[2] == "all" or set(re.findall(r"`([^`]+)`", row[2])) <= known, row[2]
