"""The code blocks of the README and of the documentation's pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MADE = {"_build", "generated"}
PAGES = (
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if not MADE & set(path.parts)),
)

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[^`\n]*)$")
_MARK = re.compile(r"<!-- not run: (?P<reason>.+) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its opening fence. reason: why it is not run, if it is not."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of `page`. A comment on the line before one may mark it as not
    run."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start, opening, reason = 0, None, None
    for number, line in enumerate(lines, start=1):
        fence = _FENCE.match(line)
        if opening is None:
            if fence:
                start, opening = number, fence
            elif line.strip():
                mark = _MARK.search(line)
                reason = mark and mark["reason"]
        elif fence and fence["fence"] == opening["fence"] and not fence["language"]:
            indent = len(opening["indent"])
            text = "\n".join(each[indent:] for each in lines[start : number - 1])
            yield Block(page, start, opening["language"].strip(), text, reason)
            opening = reason = None
