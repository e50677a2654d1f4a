"""Statements of pages about the sources are true."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT

SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("qlora_compile", "passes", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
)
_JOINED = re.compile(r'"\s*\n\s*f?"')
_LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)")
_CODE = re.compile(r"^( *```).*?^\1", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINKING = (
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "bench").rglob("*.md")),
)


REASONS = [
    text
    for row in (ROOT / "docs" / "how-to" / "reasons.md").read_text(encoding="utf-8").splitlines()
    if row.startswith("| `")
    for text in re.findall(r"`([^`]+)`", row.split("|")[1])
]
"""The reasons of the page's table; … stands for what differs."""

_BEGINNING = re.compile(
    r"its |it (is|belongs) |the (base )?weight |rows of its |the model computes |outside the |"
    r"not used |graph breaks |something has |one of its |another parameter |… computes |"
    r"(bitsandbytes|hqq|gptqmodel|torchao) (has|keeps|scales) "
)
_NOT_OF_SITES = {"it is not a transformers model", "it is nested too deep"}


def test_every_reason_is_one_that_a_report_can_give() -> None:
    sources = _JOINED.sub("", SOURCES)
    parts = [part.strip() for text in REASONS for part in text.split("…") if part.strip()]
    assert len(parts) > 40
    assert [part for part in parts if part not in sources] == []


def test_every_reason_that_a_report_can_give_is_listed() -> None:
    """Reasons are told from other texts by their first words."""
    folders = ("qlora_compile", "qlora_compile/capture", "qlora_compile/hf", "passes")
    files = [
        *(path for folder in folders for path in (ROOT / folder).glob("*.py")),
        *(ROOT / "qlora_compile" / "hf" / "bases").glob("*.py"),
    ]
    given = {text for path in files for text in texts(ast.parse(path.read_text(encoding="utf-8")))}
    given = {text for text in given if _BEGINNING.match(text)} - _NOT_OF_SITES
    assert len(given) > 40
    known = [re.compile(".*".join(map(re.escape, text.split("…")))) for text in REASONS]
    assert {text for text in given if not any(each.match(text) for each in known)} == set()


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of a source, but for docstrings, with … for what an f-string puts in."""
    nodes = list(ast.walk(tree))
    apart = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            apart |= {id(part) for part in node.values}
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield "".join(map(str, parts))
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart:
            yield node.value


def test_the_reference_lists_every_file_of_errors_but_those_of_the_command_line() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"automodule:: qlora_compile\.([\w.]+)", page))
    files = [
        *(ROOT / "qlora_compile").glob("*errors.py"),
        *(ROOT / "qlora_compile").glob("tuning/*errors.py"),
        *(ROOT / "kernels").rglob("*errors.py"),
    ]
    names = (path.relative_to(ROOT).with_suffix("").parts for path in files)
    ours = {".".join(parts).removeprefix("qlora_compile.") for parts in names}
    assert listed == ours


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for link, anchor in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        found = (page.parent / link).resolve() if link else page
        assert found.exists() or "generated" in found.parts, link
        assert not anchor or anchor in anchors(found), f"{link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and MyST give the headings of a page."""
    titles = _HEADING.findall(_CODE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_a_page_long() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 600
