"""Checks of training rows: text, turns of chats and labels, all rows before training begins.

Columns of plain types are checked by Arrow, a thousand rows at once; only rows that stand out, and
columns of mixed types, are looked at one by one.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset, IterableDataset, Value

from qlora_compile.data_errors import DataRowError
from qlora_compile.errors import EmptyDatasetError
from qlora_compile.hf.trainer.row_kinds import Holds, RowKind
from qlora_compile.hf.trainer.sources import Origin

_AT_ONCE = 1000  # rows
_TURNS = {
    "turns": (("role", "content"),),
    "named turns": (("role", "content"), ("from", "value")),
}
"""The names that the parts of a turn may have."""
ASSISTANTS = {"role": ("assistant",), "from": ("assistant", "gpt", "model", "bot")}

Fault = tuple[str, str]
"""What a cell is, and the remedy."""


def checked(table: Any, kind: RowKind, origin: Origin) -> Any:
    """Return the rows of one kind, with its columns alone, blank ones left out where the kind says.

    Rows of a stream are checked when they come.

    Raises:
        DataRowError: a row cannot be trained on; the message names the row, the column, the value
            and the remedy.
        EmptyDatasetError: all rows are blank.
    """
    first = next(iter(table), None)
    if first is None:
        raise EmptyDatasetError(site=origin.name)
    columns = _decided(kind.held(first), first)
    if not kind.keeps_others:
        table = table.select_columns(list(columns))
    if isinstance(table, IterableDataset):
        return _checked_stream(table, kind, columns, origin)
    blank: list[int] = []
    for name, holds in columns.items():
        for number in _suspects(table, name, holds, name in kind.answers):
            value = table[number][name]
            if kind.leaves_out_blank and _is_blank(value):
                blank.append(number)
            else:
                _refuse(value, name, holds, kind, origin, number)
    if len(blank) == table.num_rows:
        raise EmptyDatasetError(site=origin.name)
    return table.select(np.delete(np.arange(table.num_rows), blank)) if blank else table


def _decided(columns: Mapping[str, Holds], first: Mapping[str, Any]) -> dict[str, Holds]:
    """Replace "either" by what the first row has."""
    either = [name for name, holds in columns.items() if holds == "either"]
    style: Holds = "turns" if either and isinstance(first[either[0]], list) else "text"
    return {name: style if holds == "either" else holds for name, holds in columns.items()}


def _checked_stream(
    stream: IterableDataset, kind: RowKind, columns: Mapping[str, Holds], origin: Origin
) -> IterableDataset:
    def check(row: dict[str, Any], number: int) -> dict[str, Any]:
        for name, holds in columns.items():
            if not (kind.leaves_out_blank and _is_blank(row[name])):
                _refuse(row[name], name, holds, kind, origin, number)
        return row

    stream = stream.map(check, with_indices=True)
    if not kind.leaves_out_blank:
        return stream
    return stream.filter(lambda row: not any(_is_blank(row[name]) for name in columns))


def _refuse(
    value: object, name: str, holds: Holds, kind: RowKind, origin: Origin, number: int
) -> None:
    found = fault(value, holds, name in kind.answers)
    if found is not None:
        shown, remedy = found
        raise DataRowError(site=origin.row(number), column=name, value=shown, remedy=remedy)


def fault(value: object, holds: Holds, is_answer: bool) -> Fault | None:
    """Return what is wrong with a cell, and the remedy; None if nothing is.

    is_answer: the cell is what is learnt.
    """
    shown = reprlib.repr(value)
    if holds == "text":
        if not isinstance(value, str):
            return shown, "write a string there"
        blank = is_answer and _is_blank(value)
        return (shown, "write an answer, or leave the row out") if blank else None
    if holds == "label":
        fine = isinstance(value, str | bool | int | float | list) and value == value
        return None if fine else (shown, "give the row a label")
    if holds in _TURNS:
        return _turns_fault(value, holds, is_answer)
    return None


def _turns_fault(value: object, holds: Holds, is_answer: bool) -> Fault | None:
    shown = reprlib.repr(value)
    if not isinstance(value, list) or not value:
        return shown, 'write turns: [{"role": "user", "content": "…"}, …]'
    answers = []
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            return f"{shown}, where turn {number} is not an object", "write a role and a content"
        names = (pair for pair in _TURNS[holds] if turn.get(pair[0]) is not None)
        by, of = next(names, _TURNS[holds][0])
        role, content = turn.get(by), turn.get(of)
        if not isinstance(role, str) or not role:
            return f"{shown}, where turn {number} has no {by}", "write user, assistant or system"
        # A turn that calls tools has no text.
        if not isinstance(content, str | list) and not turn.get("tool_calls"):
            return f"{shown}, where turn {number} has no {of}", "write a string there"
        answers.append(role in ASSISTANTS[by])
    if is_answer and not any(answers):
        return f"{shown}, with no turn of the assistant", "add the answer, or leave the row out"
    return None


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _suspects(table: Dataset, name: str, holds: Holds, is_answer: bool) -> Iterator[int]:
    """Yield at least the numbers of all rows whose cell may be at fault."""
    if holds == "anything":
        return
    feature = table.features[name]
    names = _plain_turn(feature, holds)
    if names is None and not (holds == "text" and _is_string(feature)):
        yield from range(table.num_rows)
        return
    start = 0
    for part in table.select_columns([name]).with_format("arrow").iter(_AT_ONCE):
        cells = cast(Any, part)[name].combine_chunks()
        wrong = _wrong_texts(cells) if names is None else _wrong_turns(cells, names, is_answer)
        yield from (start + np.flatnonzero(wrong)).tolist()
        start += len(cells)


def _plain_turn(feature: Any, holds: Holds) -> tuple[str, str] | None:
    """Return the names of the two strings that each turn of a column has, None if it is not so."""
    turn = getattr(feature, "feature", None)
    if not isinstance(turn, Mapping):
        return None
    pairs = [pair for pair in _TURNS.get(holds, ()) if set(pair) <= set(turn)]
    return next((p for p in pairs if all(_is_string(turn[each]) for each in p)), None)


def _is_string(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _wrong_texts(cells: Any) -> np.ndarray:
    return _mask(_arrow().fill_null(_arrow().equal(_arrow().utf8_trim_whitespace(cells), ""), True))


def _wrong_turns(cells: Any, names: tuple[str, str], is_answer: bool) -> np.ndarray:
    arrow, rows = _arrow(), np.asarray(_arrow().list_parent_indices(cells))
    role, content = (arrow.struct_field(cells.flatten(), [name]) for name in names)
    missing = _mask(arrow.is_null(role)) | _mask(arrow.is_null(content))
    missing |= _mask(arrow.equal(role, ""))
    wrong = _counts(rows, cells) == 0
    wrong[rows[missing]] = True
    if is_answer:
        answers = _mask(arrow.is_in(role, pyarrow.array(ASSISTANTS[names[0]])))
        wrong |= _counts(rows[answers], cells) == 0
    return wrong


def _counts(rows: np.ndarray, cells: Any) -> np.ndarray:
    return np.bincount(rows, minlength=len(cells))


def _mask(array: Any) -> np.ndarray:
    return np.array(_arrow().fill_null(array, True).to_numpy(zero_copy_only=False), dtype=bool)


def _arrow() -> Any:  # its functions are made at run time, so that no type checker knows them
    return pyarrow.compute
