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
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def test_every_reason_is_one_that_a_report_can_give() -> None:
    sources = _JOINED.sub("", SOURCES)
    page = (ROOT / "docs" / "how-to" / "reasons.md").read_text(encoding="utf-8")
    quoted = [cell for row in page.splitlines() for cell in re.findall(r"`([^`]+)`", row)[:1]]
    parts = [part.strip() for text in quoted for part in text.split("…") if part.strip()]
    assert len(parts) > 20
    assert [part for part in parts if part not in sources] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        found = (page.parent / link).resolve()
        assert found.exists() or "generated" in found.parts, link


def test_the_readme_is_a_page_long() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 600
