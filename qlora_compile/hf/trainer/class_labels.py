"""Labels of texts: names of classes become numbers."""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel

from qlora_compile.data_errors import DataRowError
from qlora_compile.hf.trainer.objectives.classification import CLASSIFICATION
from qlora_compile.hf.trainer.preparation import TrainingRows, training_rows
from qlora_compile.hf.trainer.sources import Rows


def class_names(table: Any) -> list[str]:
    """Return the names of all classes in the column `label`, in their order; for labels that are
    numbers, these as text."""
    feature = table.features["label"]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = table.unique("label")
    if all(isinstance(value, int) for value in values):
        return [str(number) for number in range(max(values) + 1)]
    return sorted(map(str, values))


def labelled(data: Any, held_out: Any, config: Any) -> tuple[Any, Any]:
    """Return the rows of files, and those held out, with numbers for labels; other data as it is.

    config: the model's; its label2id has the numbers of names.

    Raises:
        What `training_rows` raises, and DataRowError: a label is none of the model's.
    """
    if isinstance(data, Rows):
        data = training_rows(data, CLASSIFICATION, held_out=held_out)
        held_out = data.held_out
    if not isinstance(data, TrainingRows):
        return data, held_out.table if isinstance(held_out, Rows) else held_out
    known = config.label2id or {}

    def numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
        if row["label"] not in known:
            raise DataRowError(
                site=data.origin.row(number),
                column="label",
                value=repr(row["label"]),
                remedy=f"use one of {', '.join(known)}",
            )
        return {"label": known[row["label"]]}

    tables = [data.table, data.held_out]
    if data.kind.name == "classes" and isinstance(data.table[0]["label"], str):
        tables = [
            t and t.map(numbered, with_indices=True, load_from_cache_file=False) for t in tables
        ]
    return tables[0], tables[1]
