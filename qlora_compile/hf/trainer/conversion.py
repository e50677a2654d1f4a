"""Turns rows of other projects' kinds into TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_compile.hf.trainer.row_kinds import RowKind

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def converted(table: Any, kind: RowKind, is_chat: bool) -> Any:
    """Return the table with TRL's columns.

    Rows of instructions become a prompt and a completion, of turns if `is_chat`, which says that
    there is a chat template, else of text.
    """
    if kind.name == "conversations":
        return table.map(_messages, remove_columns=["conversations"])
    if kind.name == "instruction":
        own = [name for name in ("instruction", "input", "output") if name in table.column_names]
        return table.map(_chat_completion if is_chat else _completion, remove_columns=own)
    return table


def _messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """Write ShareGPT's turns as messages, with the roles that chat templates know."""
    turns = []
    for turn in row["conversations"]:
        role = turn.get("role") or turn["from"]
        content = turn["content"] if turn.get("role") else turn["value"]
        turns.append({"role": _ROLES.get(role, role), "content": content})
    return {"messages": turns}


def _asked(row: Mapping[str, Any]) -> str:
    return "\n\n".join(filter(None, (row["instruction"], row.get("input"))))


def _completion(row: Mapping[str, Any]) -> dict[str, str]:
    return {"prompt": f"{_asked(row)}\n\n", "completion": row["output"]}


def _chat_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": _asked(row)}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }
