"""Datasets: checks that one can be trained on, tokenises it, and makes batches of its examples."""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset
from transformers.utils.generic import find_labels

from qlora_compile.errors import (
    DatasetTypeError,
    EmptyDatasetError,
    MissingLabelsError,
    NoLossError,
    OutOfRangeError,
    SequenceLengthError,
    TokenizerMissingError,
)
from qlora_compile.hf.adapters import base_model
from qlora_compile.hf.loading import is_causal
from qlora_compile.hf.rows import IGNORED, LABELS, RowRules, longest_row
from qlora_compile.hf.trainer.preparation import TrainingRows
from qlora_compile.hf.trainer.row_kinds import renamed
from qlora_compile.hf.trainer.sources import Rows, is_path, read
from qlora_compile.row_errors import RowColumnsError, RowTypeError


@dataclass(frozen=True)
class Batching:
    """Turns a list of token dicts into one batch, padded on the right.

    With `add_labels` the labels are the inputs. Padding is recognised by position and not by token:
    in many models the pad token is also the end-of-text token, which must stay a label at the end
    of a text. With `float_labels` labels are numbers, not classes.
    """

    pad_token: int
    add_labels: bool
    float_labels: bool = False

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {
            "labels" if name in LABELS else name: [torch.as_tensor(e[name]) for e in examples]
            for name in examples[0]
        }
        lengths = {len(ids) for ids in columns["input_ids"]}
        if len(lengths) > 1 and "attention_mask" not in columns:
            columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        batch = {name: self._stack(name, values) for name, values in columns.items()}
        if self.add_labels:
            batch["labels"] = batch["input_ids"].clone()
            if "attention_mask" in batch:
                batch["labels"].masked_fill_(batch["attention_mask"] == 0, IGNORED)
        return batch

    def _stack(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        # Models look up int64, and compute losses in float32; arrays come in other widths, too.
        is_float = values[0].is_floating_point() or (name == "labels" and self.float_labels)
        if values[0].dtype != torch.bool:
            values = [value.float() if is_float else value.long() for value in values]
        if values[0].dim() == 0:
            return torch.stack(values)
        fill = {"input_ids": self.pad_token, "labels": IGNORED}.get(name, 0)
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


@dataclass(frozen=True)
class Tokenizing:
    """Turns rows of text into token dicts. limit: the tokens to cut texts at, None to cut none."""

    tokenizer: Any
    limit: int | None

    def rows(self, rows: Iterable[Any]) -> dict[int, dict[str, Any]]:
        """Return each row by its number, with token ids in place of its text, blank ones left out.

        rows: strings, or mappings with a text, whose other columns are kept.

        Raises:
            TokenizerMissingError: there is no tokenizer.
            DatasetTypeError, RowColumnsError: a row is not text.
            RowTypeError: a text is not a string.
            EmptyDatasetError: all texts are blank.
        """
        if self.tokenizer is None:
            raise TokenizerMissingError(site="the dataset")
        tokenized: dict[int, dict[str, Any]] = {}
        cut = self.limit is not None
        for number, row in enumerate(rows):
            if not isinstance(row, str | Mapping):
                site, value = f"example {number}", f"{_described(row)} and no string"
                raise DatasetTypeError(site=site, value=value)
            columns = {"text": row} if isinstance(row, str) else dict(row)
            if "text" not in columns:
                raise RowColumnsError(row=number, problem="has no", column="text")
            text = columns.pop("text")
            if not isinstance(text, str | None):
                raise RowTypeError(row=number, column="text", value=repr(text), wanted="a string")
            if text and text.strip():
                tokens = self.tokenizer(text, truncation=cut, max_length=self.limit)
                tokenized[number] = columns | dict(tokens)
        if not tokenized:
            raise EmptyDatasetError(site="the dataset")
        return tokenized


class _CheckedStream(IterableDataset):
    """Checks each row of a stream when it arrives."""

    def __init__(self, stream: Any, rules: RowRules) -> None:
        self.stream, self.rules = stream, rules

    def __iter__(self) -> Iterator[Any]:
        return map(self.rules.checked_row, self.stream, itertools.count())

    def __len__(self) -> int:
        return len(self.stream)  # raises TypeError if the stream has no length, as DataLoader asks

    def __getattr__(self, name: str) -> Any:  # such as set_epoch
        if name == "stream":
            raise AttributeError(name)  # while a copy is being made
        return getattr(self.stream, name)


def prepare(
    dataset: Any, model: Any, tokenizer: Any, max_length: int | None
) -> tuple[Any, Batching]:
    """Return the dataset with token ids, and the Batching with which the model returns a loss.

    Texts are cut at `max_length` tokens (None: the model's own limit); blank ones are left out.
    Rows are checked: all of them here, or those of a stream when they come.

    Raises:
        OutOfRangeError: max_length is below 1.
        SequenceLengthError: max_length is more than the model can take.
        DatasetTypeError: datasets of this type cannot be trained on.
        EmptyDatasetError: the dataset holds no examples.
        TokenizerMissingError: the dataset holds text, and there is no tokenizer.
        NoLossError: the model takes no labels.
        MissingLabelsError: the model needs labels that the dataset does not have.
        An error of `RowRules.check_rows`: a row cannot be trained on.
    """
    base = base_model(model)
    length = checked_length(max_length, base) or longest_row(base)
    rows: Any
    rows, numbers = _rows(dataset, Tokenizing(tokenizer, length))
    # An IterableDataset has a __getitem__ too, which only raises.
    is_stream = isinstance(rows, IterableDataset)
    example = next(iter(rows), None) if is_stream else rows[0]
    if example is None:
        raise EmptyDatasetError(site="the dataset")
    if not isinstance(example, Mapping) or "input_ids" not in example:
        raise DatasetTypeError(site="the dataset's first example", value=_described(example))
    add_labels = _labels_are_inputs(model, set(example))
    rules = RowRules.of(model, example)
    if is_stream:
        stream: Any = rows
        streamed = _library_class("datasets", "IterableDataset")
        own = streamed is not None and isinstance(rows, streamed)
        checked = rules.checked_row
        rows = stream.map(checked, with_indices=True) if own else _CheckedStream(stream, rules)
    elif _is_table(rows) and rows.format["type"] != "custom":
        rules.check_table(rows)
    else:
        rules.check_rows((rows[place] for place in range(len(rows))), numbers)
    pad_token = getattr(model.config, "pad_token_id", None)
    if pad_token is None:
        pad_token = getattr(tokenizer, "pad_token_id", None)
    return rows, Batching(pad_token or 0, add_labels, float_labels=rules.has_float_labels)


def checked_length(max_length: int | None, base: Any) -> int | None:
    """Return `max_length`, in tokens.

    Raises:
        OutOfRangeError: it is below 1.
        SequenceLengthError: it is more than the model can take.
    """
    limit = longest_row(base)
    if max_length is not None and max_length < 1:
        raise OutOfRangeError(name="max_length", value=max_length, allowed="1 or more")
    if max_length is not None and limit is not None and max_length > limit:
        raise SequenceLengthError(value=max_length, model=type(base).__name__, limit=limit)
    return max_length


def rows_of(dataset: Any, columns: Mapping[str, str] | None = None) -> Any:
    """Return what can be iterated more than once: Rows of a path, or what was given.

    columns: our names of columns to those that the data has.

    Raises:
        What `sources.read` and `row_kinds.renamed` raise.
    """
    if isinstance(dataset, Rows | TrainingRows) or dataset is None:
        return dataset
    if columns or is_path(dataset):
        rows = read(dataset)
        return replace(rows, table=renamed(rows.table, columns, rows.origin.name))
    return list(dataset) if isinstance(dataset, Iterator) else dataset


def is_tokenized(dataset: Any) -> bool:
    """Whether the rows hold token ids, and no text or chat."""
    if isinstance(dataset, TrainingRows):
        return dataset.kind.name == "tokens"
    if isinstance(dataset, Rows):
        dataset = dataset.table
    names = getattr(dataset, "columns", None) if hasattr(dataset, "iloc") else None
    names = names if names is not None else getattr(dataset, "column_names", None)
    if names is not None and not isinstance(names, Mapping):
        return "input_ids" in list(names)
    if isinstance(dataset, TorchDataset) and not isinstance(dataset, IterableDataset):
        return len(dataset) > 0 and _has_tokens(dataset[0])  # pyright: ignore[reportArgumentType]
    if isinstance(dataset, str | bytes | Mapping) or not isinstance(dataset, Iterable):
        return False
    return _has_tokens(next(iter(dataset), None))


def _has_tokens(row: object) -> bool:
    return isinstance(row, Mapping) and "input_ids" in row


def label_names(model: Any) -> list[str]:
    """Return the names of the label arguments of the model's forward."""
    return find_labels(type(base_model(model)))


def _library_class(library: str, name: str) -> Any:
    """Return a class of an optional library; None if the library is not imported, as then no
    dataset has that class."""
    return getattr(sys.modules.get(library), name, None)


def _is_table(dataset: Any) -> bool:
    table = _library_class("datasets", "Dataset")
    return table is not None and isinstance(dataset, table)


def _rows(dataset: Any, tokenizing: Tokenizing) -> tuple[Any, Iterable[int]]:
    """Return the dataset's rows, with token ids where there was text, and their numbers."""
    if isinstance(dataset, IterableDataset):
        return dataset, itertools.count()
    frame = _library_class("pandas", "DataFrame")
    rows: Any = dataset
    if frame is not None and isinstance(dataset, frame):
        rows = _records(dataset)
    elif not isinstance(dataset, TorchDataset) and not _is_table(dataset):
        if isinstance(dataset, str | bytes | Mapping) or not isinstance(dataset, Iterable):
            raise DatasetTypeError(site="dataset", value=_described(dataset))
        rows = list(dataset)
    if len(rows) == 0:
        raise EmptyDatasetError(site="the dataset")
    first = rows[0]
    is_text = isinstance(first, Mapping) and "text" in first and "input_ids" not in first
    if not is_text and not isinstance(first, str):
        return rows, itertools.count()
    tokenized = tokenizing.rows(rows[place] for place in range(len(rows)))
    return list(tokenized.values()), tokenized


def _records(frame: Any) -> list[dict[str, Any]]:
    """Return the rows of a pandas DataFrame, with None where a value is missing."""
    # First pandas' own dtypes: NumPy's turn whole numbers beside a missing one into floats.
    records = frame.convert_dtypes().to_dict("records")
    return [{n: None if _is_missing(v) else v for n, v in row.items()} for row in records]


def _is_missing(value: object) -> bool:
    return value is sys.modules["pandas"].NA or (isinstance(value, float) and math.isnan(value))


def _labels_are_inputs(model: Any, columns: set[str]) -> bool:
    base = base_model(model)
    expected = label_names(model)
    if not expected:
        raise NoLossError(model=type(base).__name__)
    accepted = {*expected, *LABELS} if "labels" in expected else set(expected)
    if columns & accepted:
        return False
    if not is_causal(type(base).__name__):
        raise MissingLabelsError(
            model=type(base).__name__,
            columns=", ".join(sorted(columns)),
            expected=" and ".join(expected),
        )
    return True


def _described(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(str, value)) or 'none'}"
    return f"a {type(value).__name__}"
