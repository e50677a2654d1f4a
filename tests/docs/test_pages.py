"""Statements of pages about the sources are true."""

import re
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


def test_every_reason_is_one_that_a_report_can_give() -> None:
    sources = _JOINED.sub("", SOURCES)
    page = (ROOT / "docs" / "how-to" / "reasons.md").read_text(encoding="utf-8")
    quoted = [cell for row in page.splitlines() for cell in re.findall(r"`([^`]+)`", row)[:1]]
    parts = [part.strip() for text in quoted for part in text.split("…") if part.strip()]
    assert len(parts) > 20
    assert [part for part in parts if part not in sources] == []


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
