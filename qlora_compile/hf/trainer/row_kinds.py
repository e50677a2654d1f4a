"""Kinds of training rows: which columns each has, and what these hold.

The names of columns are TRL's; `instruction`, `input`, `output` are those of Stanford Alpaca, and
`conversations` those of ShareGPT.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_compile.data_errors import ColumnNameError, DataColumnsError, ObjectiveRowsError

Holds = Literal["text", "turns", "named turns", "either", "label", "anything"]
"""What a column holds: text; the turns of a chat, each with role and content, or with other names
for these; text or turns, the same in all columns of the row that may hold either; a label; what
this package does not look into."""


@dataclass(frozen=True)
class RowKind:
    """One kind of row.

    columns: what a row must have. optional: what it may have besides. answers: the columns that are
    learnt, and so must not be blank. leaves_out_blank: blank rows are left out and not refused.
    keeps_others: other columns of the source stay, for reward functions.
    """

    name: str
    columns: Mapping[str, Holds]
    optional: Mapping[str, Holds]
    answers: tuple[str, ...] = ()
    leaves_out_blank: bool = False
    keeps_others: bool = False

    def held(self, names: Collection[str]) -> dict[str, Holds]:
        """Return those columns among `names` that belong to the kind, with what they hold."""
        known: dict[str, Holds] = {**self.columns, **self.optional}
        return {name: holds for name, holds in known.items() if name in names}


_TOOLS: dict[str, Holds] = {"tools": "anything", "chat_template_kwargs": "anything"}

ROW_KINDS = (
    RowKind("tokens", {"input_ids": "anything"}, {}, keeps_others=True),
    RowKind(
        "preference",
        {"chosen": "either", "rejected": "either"},
        {"prompt": "either", **_TOOLS},
        answers=("chosen", "rejected"),
    ),
    RowKind(
        "judged",
        {"prompt": "either", "completion": "either", "label": "label"},
        _TOOLS,
        answers=("completion",),
    ),
    RowKind(
        "completion", {"prompt": "either", "completion": "either"}, _TOOLS, answers=("completion",)
    ),
    RowKind(
        "instruction",
        {"instruction": "text", "output": "text"},
        {"input": "anything"},
        answers=("output",),
    ),
    RowKind("messages", {"messages": "turns"}, _TOOLS, answers=("messages",)),
    RowKind("conversations", {"conversations": "named turns"}, _TOOLS, answers=("conversations",)),
    RowKind("classes", {"text": "text", "label": "label"}, {}, answers=("text",)),
    RowKind("text", {"text": "text"}, {}, answers=("text",), leaves_out_blank=True),
    RowKind("prompt", {"prompt": "either"}, _TOOLS, keeps_others=True),
)
"""A dataset is of the first kind that the objective trains on and whose columns it has."""


def renamed(table: Any, columns: Mapping[str, str] | None, site: str) -> Any:
    """Return `table` with its own columns under other names.

    columns: our name of a column to the table's name of it.

    Raises:
        ColumnNameError: a name is unknown, or there is no such column in the table.
    """
    known = {name for kind in ROW_KINDS for name in (*kind.columns, *kind.optional)}
    present = list(table.column_names or next(iter(table)))
    for name, own in (columns or {}).items():
        if name not in known:
            problem = "no kind of row has this column"
            remedy = f"use one of {', '.join(sorted(known))}"
            raise ColumnNameError(name=name, value=own, problem=problem, remedy=remedy)
        if own not in present:
            problem, remedy = f"{site} has no column {own!r}", f"use one of {', '.join(present)}"
            raise ColumnNameError(name=name, value=own, problem=problem, remedy=remedy)
        if name != own and name in present:
            table = table.remove_columns(name)
    changed = {own: name for name, own in (columns or {}).items() if own != name}
    return table.rename_columns(changed) if changed else table


def kind_of(
    names: Collection[str], objective: str, accepted: tuple[str, ...], site: str
) -> RowKind:
    """Return the kind of rows with these columns that the objective trains on.

    Raises:
        ObjectiveRowsError: the objective does not train on rows with these columns.
        DataColumnsError: no kind of row has these columns.
    """
    fitting = [kind for kind in ROW_KINDS if kind.columns.keys() <= set(names)]
    for kind in fitting:
        if kind.name in accepted:
            return kind
    if not fitting:
        known = " | ".join(", ".join(kind.columns) for kind in ROW_KINDS)
        raise DataColumnsError(site=site, columns=", ".join(names) or "none", known=known)
    columns = {kind.name: " + ".join(kind.columns) for kind in ROW_KINDS}
    raise ObjectiveRowsError(
        site=site,
        kind=fitting[0].name,
        objective=objective,
        known=" | ".join(columns[name] for name in accepted),
        remedy="choose the objective for such rows, or rename columns",
    )
