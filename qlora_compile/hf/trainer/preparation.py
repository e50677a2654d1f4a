"""From any source of data to the rows that a trainer of TRL takes, and what it needs to know."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from qlora_compile.data_errors import ChatTemplateError
from qlora_compile.errors import TokenizerMissingError
from qlora_compile.hf.trainer import chat_templates
from qlora_compile.hf.trainer.conversion import converted
from qlora_compile.hf.trainer.objectives.base import Objective
from qlora_compile.hf.trainer.objectives.sft import SFT
from qlora_compile.hf.trainer.row_checks import checked
from qlora_compile.hf.trainer.row_kinds import RowKind, kind_of
from qlora_compile.hf.trainer.sources import Origin, Rows, read

_FEWEST_KEPT = 1024  # rows; a power of two
_SAMPLED = 256  # rows
_CHARACTERS_PER_TOKEN = 6  # more than tokenizers reach on average, so that rows are not too few


@dataclass(frozen=True)
class TrainingRows:
    """Checked rows of one kind. held_out: rows of the same kind, None if there are none."""

    table: Any
    kind: RowKind
    origin: Origin
    held_out: Any = None

    @property
    def learns_turns(self) -> bool:
        """Whether what is learnt are the turns of one role."""
        return self.kind.name in ("messages", "conversations")

    @property
    def is_chat(self) -> bool:
        """Whether the rows hold turns of a chat."""
        row = next(iter(self.table))
        return any(
            holds in ("turns", "named turns", "either") and isinstance(row[name], list)
            for name, holds in self.kind.held(row).items()
        )


def training_rows(data: Any, objective: Objective, *, held_out: Any = None) -> TrainingRows:
    """Read and check all rows of `data`, and of `held_out`: Rows, or what `read` takes.

    Raises:
        What `read`, `kind_of` and `checked` raise.
    """
    rows = data if isinstance(data, Rows) else read(data)
    table, kind = _checked(rows, objective)
    if held_out is not None:
        apart = held_out if isinstance(held_out, Rows) else read(held_out)
    elif rows.held_out is not None:
        apart = Rows(rows.held_out, Origin(f"{rows.origin.name} (held out)"))
    else:
        return TrainingRows(table, kind, rows.origin)
    return TrainingRows(table, kind, rows.origin, _checked(apart, objective)[0])


def _checked(rows: Rows, objective: Objective) -> tuple[Any, RowKind]:
    names = rows.table.column_names or list(next(iter(rows.table), {}))
    kind = kind_of(names, objective.name, objective.kinds, rows.origin.name)
    return checked(rows.table, kind, rows.origin), kind


def enough_rows(rows: TrainingRows, arguments: Any) -> TrainingRows:
    """Return as many rows, drawn at random, as a training with a limit of steps may come to.

    A trainer would prepare all rows in advance, which takes minutes for large files.
    """
    table = rows.table
    if arguments.max_steps <= 0 or not isinstance(table, Dataset):
        return rows
    wanted = arguments.max_steps * arguments.train_batch_size * arguments.world_size
    wanted *= arguments.gradient_accumulation_steps
    if getattr(arguments, "packing", False):
        sample = table.shuffle(seed=arguments.seed).select(range(min(_SAMPLED, len(table))))
        characters = sum(map(_characters, sample)) / len(sample)
        wanted *= 1 + int(arguments.max_length * _CHARACTERS_PER_TOKEN / max(characters, 1))
    # A power of two, so that a few more steps still train on the same rows.
    wanted = 1 << (max(wanted, _FEWEST_KEPT) - 1).bit_length()
    if wanted < len(table):
        table = table.shuffle(seed=arguments.seed).select(range(wanted)).flatten_indices()
    return TrainingRows(table, rows.kind, rows.origin, rows.held_out)


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def trl_rows(rows: TrainingRows, tokenizer: Any) -> TrainingRows:
    """Return the rows with TRL's columns."""
    has_template = bool(tokenizer.chat_template)
    table, held_out = (
        None if each is None else converted(each, rows.kind, has_template)
        for each in (rows.table, rows.held_out)
    )
    return TrainingRows(table, rows.kind, rows.origin, held_out)


def templates_checked(
    rows: TrainingRows, tokenizer: Any, options: Mapping[str, Any], objective: Objective
) -> Any:
    """Return a copy of the tokenizer, with a chat template that marks what is learnt if the
    objective learns turns of a chat.

    options: of the trainer's configuration; chat_template_path and assistant_only_loss count.

    Raises:
        TokenizerMissingError: there is no tokenizer.
        ChatTemplateError: rows hold turns of a chat, and there is no template for them.
    """
    if tokenizer is None:
        raise TokenizerMissingError(site=rows.origin.name)
    marked = copy.deepcopy(with_template(tokenizer, options.get("chat_template_path")))
    if rows.is_chat:
        chat_templates.require_template(marked, rows.origin.name)
    learns_turns = options.get("assistant_only_loss", rows.learns_turns)
    if objective is SFT and rows.is_chat and learns_turns:
        marked.chat_template = chat_templates.training_template(marked, rows.origin.name)
    return marked


def with_template(tokenizer: Any, path: str | None) -> Any:
    """Return the tokenizer, with the chat template in the file `path` if one is given.

    Raises:
        ChatTemplateError: there is no such file.
    """
    if path is None or tokenizer is None:
        return tokenizer
    if not Path(path).is_file():
        raise ChatTemplateError(
            site="the data",
            problem=f"chat_template_path={path!r} is not a file",
            remedy="check the path",
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    return tokenizer


def is_stream(table: Any) -> bool:
    return isinstance(table, IterableDataset)


def texts(data: Any, tokenizer: Any, count: int) -> list[str]:
    """Return up to `count` rows of `data`, which `read` takes, as text: chats by the tokenizer's
    template, prompts with their completions.

    Raises:
        What `training_rows` and `templates_checked` raise.
    """
    rows = training_rows(data, SFT)
    templates_checked(rows, tokenizer, {"assistant_only_loss": False}, SFT)
    table = rows.table.select(range(min(count, len(rows.table))))
    made = trl_rows(TrainingRows(table, rows.kind, rows.origin), tokenizer).table
    return [_text(row, tokenizer) for row in made]


def _text(row: Mapping[str, Any], tokenizer: Any) -> str:
    if "text" in row:
        return row["text"]
    whole = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    return whole if isinstance(whole, str) else tokenizer.apply_chat_template(whole, tokenize=False)
