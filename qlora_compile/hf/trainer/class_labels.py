"""Labels of texts: names of classes become numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

from datasets import ClassLabel

from qlora_compile.data_errors import DataRowError
from qlora_compile.errors import MissingLabelsError
from qlora_compile.hf.rows import LABELS
from qlora_compile.hf.trainer.objectives.classification import CLASSIFICATION
from qlora_compile.hf.trainer.preparation import TrainingRows, training_rows
from qlora_compile.hf.trainer.sources import Origin, Rows


def class_names(rows: TrainingRows) -> list[str]:
    """Return the names of all classes among the labels, held-out rows' too, in their order; for
    labels that are numbers, these as text.

    Raises:
        MissingLabelsError: there is no column of labels.
    """
    tables = [each for each in (rows.table, rows.held_out) if each is not None]
    names = tables[0].column_names
    column = next((name for name in LABELS if name in names), None)
    if column is None:
        raise MissingLabelsError(model="a classifier", columns=", ".join(names), expected="label")
    feature = tables[0].features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = {value for each in tables for value in each.unique(column)}
    if all(isinstance(value, int) for value in values):
        return [str(number) for number in range(max(values) + 1)]
    return sorted(map(str, values))


def labelled(data: Any, held_out: Any, config: Any) -> tuple[Any, Any]:
    """Return the rows of files, and those held out, with numbers for labels; other data as it is.

    config: the model's; its label2id has the numbers of names.

    Raises:
        What `training_rows` raises, and DataRowError: a label is none of the model's.
    """
    apart = held_out.origin if isinstance(held_out, Rows) else Origin("the held-out rows")
    if isinstance(data, Rows):
        data = training_rows(data, CLASSIFICATION, held_out=held_out)
        held_out = data.held_out
    if not isinstance(data, TrainingRows):
        return data, held_out.table if isinstance(held_out, Rows) else held_out
    known = config.label2id or {}

    def numbered(row: dict[str, Any], number: int, origin: Origin) -> dict[str, Any]:
        if row["label"] not in known:
            raise DataRowError(
                site=origin.row(number),
                column="label",
                value=repr(row["label"]),
                remedy=f"use one of {', '.join(known)}",
            )
        return {"label": known[row["label"]]}

    if data.kind.name != "classes" or not isinstance(data.table[0]["label"], str):
        return data.table, data.held_out
    options = {"with_indices": True, "load_from_cache_file": False}
    rows, held_out = (
        table and table.map(partial(numbered, origin=origin), **options)
        for table, origin in ((data.table, data.origin), (data.held_out, apart))
    )
    return rows, held_out
