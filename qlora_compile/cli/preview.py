"""The command line's `train --preview`: shows rows as they are trained on, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from qlora_compile.training.run import TrainingRun

LEARNT, GIVEN = "bold green", "dim"


def show(run: TrainingRun, count: int) -> None:
    """Print `count` rows of a run, with what is learnt in colour or, without colours, in ⟦ and ⟧.

    Raises:
        QloraCompileError: as the run would.
    """
    from qlora_compile.hf.training import quiet

    quiet()
    *_, tokenizer, rows = run.checked()
    from qlora_compile.hf.trainer.token_rows import token_rows

    console = Console()
    prepared = token_rows(run, tokenizer, rows)
    for number, row in zip(range(count), prepared, strict=False):
        console.rule(f"row {number}")
        console.print(as_text(row, tokenizer, coloured=console.color_system is not None))


def as_text(row: Mapping[str, Any], tokenizer: Any, *, coloured: bool) -> Text:
    """Return a row of token ids as text."""
    text = Text()
    for ids, is_learnt in _parts(row):
        decoded = tokenizer.decode(ids)
        if is_learnt and not coloured:
            decoded = f"⟦{decoded}⟧"
        text.append(decoded, LEARNT if is_learnt else GIVEN)
    return text


def _parts(row: Mapping[str, Any]) -> Iterator[tuple[list[int], bool]]:
    """Yield the row's token ids in parts, each with whether it is learnt."""
    if "labels" in row and isinstance(row["labels"], list):
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        for is_learnt, part in groupby(pairs, lambda pair: pair[1] != -100):
            yield [token for token, _ in part], is_learnt
        return
    for name, ids in row.items():
        if name.endswith("_ids"):
            yield list(ids), not name.startswith("prompt") and name != "input_ids"
