"""Datasets: checks that one can be trained on, tokenises it, and makes batches of its examples."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    TokenizerMissingError,
)
from qlora_compile.hf.adapters import base_model
from qlora_compile.hf.loading import is_causal, longest_sequence

_IGNORED = -100  # the label that cross entropy ignores
_LABEL_ALIASES = ("label", "label_ids")  # names in datasets for the column that models call labels


@dataclass(frozen=True)
class Batching:
    """Turns a list of token dicts into one batch, padded on the right.

    With `add_labels` the labels are the inputs. Padding is recognised by its position and not by
    its token: in many models the pad token is also the end-of-text token, and that must stay a
    label where it ends a text.
    """

    pad_token: int
    add_labels: bool

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {name: [torch.as_tensor(e[name]) for e in examples] for name in examples[0]}
        lengths = {len(ids) for ids in columns["input_ids"]}
        if len(lengths) > 1 and "attention_mask" not in columns:
            columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        batch = {
            "labels" if name in _LABEL_ALIASES else name: self._stack(name, values)
            for name, values in columns.items()
        }
        if self.add_labels:
            batch["labels"] = batch["input_ids"].clone()
            if "attention_mask" in batch:
                batch["labels"].masked_fill_(batch["attention_mask"] == 0, _IGNORED)
        return batch

    def _stack(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        if values[0].dim() == 0:
            return torch.stack(values)
        fill = {"input_ids": self.pad_token, "labels": _IGNORED}.get(name, 0)
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


def prepare(
    dataset: Any, model: Any, tokenizer: Any, max_length: int | None
) -> tuple[Any, Batching]:
    """Return the dataset with token ids, and the Batching with which the model returns a loss.

    Texts are cut at `max_length` tokens (None: the model's own limit); blank ones are left out.

    Raises:
        OutOfRangeError: max_length is below 1.
        DatasetTypeError: the dataset is of no kind that can be trained on.
        EmptyDatasetError: the dataset holds no examples.
        TokenizerMissingError: the dataset holds text, and there is no tokenizer.
        NoLossError: the model takes no labels.
        MissingLabelsError: the model needs labels that the dataset does not have.
    """
    if max_length is not None and max_length < 1:
        raise OutOfRangeError(name="max_length", value=max_length, allowed="1 or more")
    limit = longest_sequence(model.config) if max_length is None else max_length
    rows = _rows(dataset, tokenizer, limit)
    # An IterableDataset has a __getitem__ too, which only raises.
    example = next(iter(rows), None) if isinstance(rows, IterableDataset) else rows[0]
    if example is None:
        raise EmptyDatasetError(site="the dataset")
    if not isinstance(example, Mapping) or "input_ids" not in example:
        raise DatasetTypeError(site="the dataset's first example", value=_described(example))
    add_labels = _labels_are_inputs(model, set(example))
    pad_token = getattr(model.config, "pad_token_id", None)
    if pad_token is None:
        pad_token = getattr(tokenizer, "pad_token_id", None)
    return rows, Batching(pad_token=pad_token or 0, add_labels=add_labels)


def label_names(model: Any) -> list[str]:
    """Return the names of the label arguments of the model's forward."""
    return find_labels(type(base_model(model)))


def _rows(dataset: Any, tokenizer: Any, limit: int | None) -> Any:
    # `datasets` is optional here; if `dataset` is one of its, the package has been imported.
    library = sys.modules.get("datasets")
    if library is not None and isinstance(dataset, library.Dataset):
        return _table(dataset, tokenizer, limit)
    if isinstance(dataset, IterableDataset):
        return dataset
    if isinstance(dataset, TorchDataset):
        sized: Any = dataset
        if len(sized) == 0:
            raise EmptyDatasetError(site="the dataset")
        if not isinstance(sized[0], str):
            return dataset
        dataset = [sized[index] for index in range(len(sized))]
    if isinstance(dataset, str | bytes | Mapping) or not isinstance(dataset, Iterable):
        raise DatasetTypeError(site="dataset", value=_described(dataset))
    rows = list(dataset)
    if not rows:
        raise EmptyDatasetError(site="the dataset")
    kind, wanted = (str, "string") if isinstance(rows[0], str) else (Mapping, "token dict")
    for index, row in enumerate(rows):
        if not isinstance(row, kind):
            raise DatasetTypeError(
                site=f"example {index}", value=f"{_described(row)} and no {wanted}"
            )
    if kind is Mapping:
        return rows
    return _tokenized([{"text": text} for text in rows], tokenizer, limit)


def _table(table: Any, tokenizer: Any, limit: int | None) -> Any:
    if len(table) == 0:
        raise EmptyDatasetError(site="the dataset")
    if "input_ids" in table.column_names:
        return table
    if "text" not in table.column_names:
        columns = ", ".join(table.column_names)
        raise DatasetTypeError(site="dataset", value=f"a datasets.Dataset with columns {columns}")
    return _tokenized(table, tokenizer, limit)


def _tokenized(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, limit: int | None
) -> list[dict[str, Any]]:
    """Return the rows with token ids in place of their text; other columns are kept."""
    if tokenizer is None:
        raise TokenizerMissingError(site="the dataset")
    tokenized = [
        {name: value for name, value in row.items() if name != "text"}
        | dict(tokenizer(row["text"], truncation=limit is not None, max_length=limit))
        for row in rows
        if row["text"] and row["text"].strip()
    ]
    if not tokenized:
        raise EmptyDatasetError(site="the dataset")
    return tokenized


def _labels_are_inputs(model: Any, columns: set[str]) -> bool:
    base = base_model(model)
    expected = label_names(model)
    if not expected:
        raise NoLossError(model=type(base).__name__)
    accepted = {*expected, *_LABEL_ALIASES} if "labels" in expected else set(expected)
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
