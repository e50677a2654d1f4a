"""The summary and the table of a sweep, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from bench.coverage.row import EQUAL, TRAINS, Row


def summary(rows: list[Row]) -> list[str]:
    """Return lines with the main figures, then with what falls short, grouped by reason."""
    trained = [row for row in rows if row.stock == TRAINS]
    equal = [row for row in trained if row.ours == EQUAL]
    rounded = [row for row in equal if row.floor]
    targets = sum(row.targets for row in trained)
    others = sum(sum(row.other_targets.values()) for row in trained)
    experts = sum(row.expert_targets for row in trained)
    fused_experts = sum(row.fused_experts for row in trained)
    parameters = sum(row.target_parameters for row in trained)
    fused_parameters = sum(row.fused_parameters for row in trained)
    broken = [row for row in trained if row.breaks]
    whole = [row for row in equal if row.targets == row.fused_targets and not row.breaks]
    lines = [
        f"{len(rows)} model types; stock transformers + PEFT trains {len(trained)} of them",
        f"{len(equal)} of these {len(trained)} train equally through qlora_compile"
        + (f"; {len(rounded)} of them only as far as rounding allows" if rounded else ""),
        f"{sum(row.fused_targets for row in trained)} of {targets} adapted linears fused; "
        f"{others} adapted modules are not linears",
        f"{fused_experts} of {experts} adapted weights of experts fused",
        f"together {fused_parameters / max(parameters, 1):.1%} of the elements of adapted weights",
        f"{len(whole)} types are equal with all adapted linears fused and no graph break",
        f"{len(broken)} types have graph breaks inside blocks",
    ]
    for title, column in (
        ("adapted linears left alone", "left_targets"),
        ("adapted weights of experts left alone", "left_experts"),
        ("adapted modules that are not linears", "other_targets"),
        ("graph breaks", "breaks"),
    ):
        lines += [f"{title}: {line}" for line in _grouped(trained, column)]
    failed = [row for row in trained if row.ours != EQUAL]
    lines += [f"not equal: {row.name}: {_problem(row)}" for row in failed]
    return lines


def _grouped(rows: Iterable[Row], column: str) -> list[str]:
    """Return one line per reason: how many, and in which types; the most common reason first."""
    count: Counter[str] = Counter()
    where: dict[str, list[str]] = {}
    for row in rows:
        for reason, number in getattr(row, column).items():
            count[reason] += number
            where.setdefault(reason, []).append(row.name)
    order = sorted(where, key=lambda reason: (-len(where[reason]), reason))
    return [f"{count[r]} in {len(where[r])} types: {r} ({_some(where[r])})" for r in order]


def _some(names: list[str], most: int = 6) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _problem(row: Row) -> str:
    """What is wrong with a row that is not equal."""
    if not row.errors:
        return f"{row.ours} {row.worst}".strip()
    told = [("", row.errors), ("in float64 ", row.exact), ("after one rounding ", row.floor)]
    parts = [
        title + ", ".join(f"{group} {error:.1e}" for group, error in errors.items())
        for title, errors in told
        if errors
    ]
    return f"{row.ours}: {'; '.join(parts)}; most at {row.worst}"


def markdown(rows: list[Row], how: str) -> str:
    """The whole document; `how` tells how the rows were made."""
    lines = ["# Coverage of transformers' model types", "", how, ""]
    lines += [f"- {_plain(line)}" for line in summary(rows)]
    header = ("type", "family", "stock", "ours", "largest error", "linears", "fused")
    header += ("adapted", "fused", "adapted experts", "fused", "other adapted", "breaks")
    header += ("graphs / kinds",)
    lines += ["", _line(header), _line(("---",) * len(header))]
    lines += [_line(_cells(row)) for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    trains = row.stock == TRAINS
    error = max(row.errors.values(), default=None)
    sizes = (row.sites, row.fused, row.targets, row.fused_targets)
    sizes += (row.expert_targets, row.fused_experts)
    return (
        *(row.name, row.family, row.stock, row.ours),
        "" if error is None else f"{error:.0e}",
        *(str(size) if trains else "" for size in sizes),
        ", ".join(f"{count} {name}" for name, count in row.other_targets.items()),
        str(sum(row.breaks.values())) if trains else "",
        f"{row.graphs} / {row.kinds}" if trains else "",
    )


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_plain, cells)) + " |"


def _plain(text: str) -> str:
    """Return `text` on one line, without characters that would end a cell or become a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
