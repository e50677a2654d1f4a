"""RowRules: what a row of token ids and labels must be for a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from torch import nn

from qlora_compile.errors import DatasetTypeError, QloraCompileError
from qlora_compile.hf.adapters import base_model
from qlora_compile.hf.loading import is_causal, longest_sequence, text_config
from qlora_compile.hf.row_columns import Column, Found
from qlora_compile.row_errors import (
    ColumnLengthError,
    EmptyRowError,
    RowColumnsError,
    RowLabelError,
    RowLengthError,
    RowTokenError,
    RowTypeError,
)

IGNORED = -100  # the label that cross entropy ignores
LABELS = ("labels", "label", "label_ids")
"""Names in datasets for the column that models call labels."""

_TOKEN_IDS = ("input_ids", "decoder_input_ids")
_BESIDE_TOKENS = ("attention_mask", "token_type_ids", "position_ids")
_AT_ONCE = 1000  # rows

Fault = tuple[str, Found | None, type[QloraCompileError], dict[str, Any]]
"""A column, its first row that breaks a rule, and the rule's error with its fields."""


@dataclass(frozen=True)
class LabelRule:
    """What the labels of a row must be.

    per: what has a label. "sequence": the row has a second sequence of tokens, which are its
    labels. classes: labels are whole numbers below this; None for numbers of any kind, as in
    regression. count: how many labels a row has if it is labelled as a whole.
    """

    per: Literal["token", "sequence", "row"]
    classes: int | None
    count: int = 1


@dataclass(frozen=True)
class RowRules:
    """What the rows of one dataset must be for one model.

    accepted: the columns that the model takes. columns: those of them that the dataset's first row
    has, and all others must have. vocabulary, positions: how many token ids and positions the model
    has, None if unknown. labels: the name of the column of labels, and the rule for it; None if
    there is none.
    """

    model: str
    accepted: frozenset[str]
    columns: frozenset[str]
    vocabulary: int | None
    positions: int | None
    labels: tuple[str, LabelRule] | None

    @classmethod
    def of(cls, model: Any, row: Mapping[str, Any]) -> RowRules:
        """Return the rules for a dataset that begins with `row`."""
        base: Any = base_model(model)
        accepted = frozenset((*inspect.signature(type(base).forward).parameters, *LABELS))
        name = next((name for name in LABELS if name in row), None)
        rule = None if name is None else label_rule(base, row[name])
        return cls(
            model=type(base).__name__,
            accepted=accepted,
            columns=accepted & set(row),
            vocabulary=getattr(text_config(base.config), "vocab_size", None),
            positions=longest_row(base),
            labels=None if name is None or rule is None else (name, rule),
        )

    @property
    def checked(self) -> frozenset[str]:
        """The columns of labels and of one item per token; images, for example, are not checked."""
        return self.columns.intersection((*_TOKEN_IDS, *_BESIDE_TOKENS, *LABELS))

    @property
    def has_float_labels(self) -> bool:
        return self.labels is not None and self.labels[1].classes is None

    def check_rows(self, rows: Iterable[Any], numbers: Iterable[int]) -> None:
        """Check `rows`; errors name them by their `numbers`.

        Raises:
            DatasetTypeError: a row is not a token dict.
            RowColumnsError, RowTypeError, EmptyRowError, RowLengthError, RowTokenError,
            ColumnLengthError, RowLabelError: a row cannot be trained on.
        """
        numbered = zip(rows, numbers, strict=False)
        while some := list(islice(numbered, _AT_ONCE)):
            for row, number in some:
                if not isinstance(row, Mapping):
                    raise DatasetTypeError(site=f"row {number}", value=f"a {type(row).__name__}")
                for name in sorted(self.accepted):
                    if (row.get(name) is None) == (name in self.columns):
                        problem = "has no" if name in self.columns else "unlike others has"
                        raise RowColumnsError(row=number, problem=problem, column=name)
            columns = {name: Column.of([row[name] for row, _ in some]) for name in self.checked}
            self._check(columns, [number for _, number in some])

    def check_table(self, table: Any) -> None:
        """Check a datasets.Dataset a part at a time; raises as `check_rows`."""
        arrow = table.select_columns(sorted(self.checked)).with_format("arrow")
        for start in range(0, len(table), _AT_ONCE):
            part = arrow[start : start + _AT_ONCE]
            columns = {name: Column.of_arrow(part[name]) for name in self.checked}
            self._check(columns, range(start, start + _AT_ONCE))

    def checked_row(self, row: Any, number: int) -> Any:
        """Return the row; raises as `check_rows`."""
        self.check_rows([row], [number])
        return row

    def _check(self, columns: Mapping[str, Column], numbers: Sequence[int]) -> None:
        for column, found, error, fields in self._faults(columns):
            if found is not None:
                row, value = found
                raise error(
                    row=numbers[row],
                    column=column,
                    value=value,
                    model=self.model,
                    **{k: v[row] if isinstance(v, np.ndarray) else v for k, v in fields.items()},
                )

    def _faults(self, columns: Mapping[str, Column]) -> Iterator[Fault]:
        for name, column in columns.items():
            yield name, column.row_where(column.missing), RowColumnsError, {"problem": "has no"}
        for name in self.columns.intersection(_TOKEN_IDS):
            yield from self._token_faults(name, columns[name])
            largest = (self.vocabulary or 0) - 1
            values = columns[name].values
            wrong = (values < 0) | ((values > largest) & (largest >= 0))
            found = columns[name].value_where(wrong)
            yield name, found, RowTokenError, {"largest": largest}
        ids = columns["input_ids"]
        for name in self.columns.intersection(_BESIDE_TOKENS):
            yield from _length_faults(name, columns[name], ids)
        if self.labels is not None:
            name, rule = self.labels
            yield from self._label_faults(name, columns[name], rule, ids)

    def _token_faults(self, name: str, column: Column) -> Iterator[Fault]:
        found = column.row_where(~column.of_kind("iu") | (column.dims == 0))
        yield name, found, RowTypeError, {"wanted": "a list of whole numbers"}
        yield name, column.row_where(column.lengths == 0), EmptyRowError, {}
        if self.positions is not None:
            found = column.row_where(column.lengths > self.positions, column.lengths)
            yield name, found, RowLengthError, {"limit": self.positions}

    def _label_faults(
        self, name: str, column: Column, rule: LabelRule, ids: Column
    ) -> Iterator[Fault]:
        if rule.per == "sequence":
            yield from self._token_faults(name, column)
        elif rule.per == "token":
            yield from _length_faults(name, column, ids)
        else:
            found = column.row_where(column.counts != rule.count, column.counts)
            wanted = "one for the row" if rule.count == 1 else "one for each of the model's labels"
            fields = {"length": rule.count, "wanted": wanted}
            yield name, found, ColumnLengthError, fields
        kinds, wanted = ("iuf", "numbers") if rule.classes is None else ("iu", "whole numbers")
        yield name, column.row_where(~column.of_kind(kinds)), RowTypeError, {"wanted": wanted}
        if rule.classes is None:
            wrong = ~np.isfinite(column.values)
            yield name, column.value_where(wrong), RowTypeError, {"wanted": "finite numbers"}
        else:
            values = column.values
            wrong = ((values < 0) & (values != IGNORED)) | (values >= rule.classes)
            yield name, column.value_where(wrong), RowLabelError, {"largest": rule.classes - 1}


def _length_faults(name: str, column: Column, ids: Column) -> Iterator[Fault]:
    # Other dimensions than one: choices of a multiple-choice row, or a mask for each layer.
    wrong = (column.lengths != ids.lengths) & (column.dims <= 1) & (ids.dims <= 1)
    found = column.row_where(wrong, column.counts)
    fields = {"length": ids.lengths, "wanted": "one for each token"}
    yield name, found, ColumnLengthError, fields


def label_rule(base: Any, label: Any) -> LabelRule | None:
    """Return the rule of transformers' losses for labels like `label`; None for models with labels
    of other kinds."""
    name, config = type(base).__name__, base.config
    if name.endswith("ForSequenceClassification"):
        problem = config.problem_type
        if problem is None and config.num_labels == 1:
            problem = "regression"
        one = Column.of([label])
        if problem is None and one.dims.all() and one.of_kind("f").all():
            problem = "multi_label_classification"
        if problem == "single_label_classification" or problem is None:
            return LabelRule("row", config.num_labels)
        return LabelRule("row", None, config.num_labels)
    if name.endswith("ForTokenClassification"):
        return LabelRule("token", config.num_labels)
    vocabulary = getattr(text_config(config), "vocab_size", None)
    if getattr(config, "is_encoder_decoder", False):
        return LabelRule("sequence", vocabulary)
    if is_causal(name) or name.endswith("ForMaskedLM"):
        return LabelRule("token", vocabulary)
    return None


def longest_row(model: Any) -> int | None:
    """Return the number of tokens that a row may have, None if the model states no limit."""
    limit = longest_sequence(model.config)
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if is_table and limit is not None and module.padding_idx is not None:
            # RoBERTa and its kin count positions from the one after the padding's.
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit
