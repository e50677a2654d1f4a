"""Rows that cannot be trained on: one error each, whatever the dataset, the model and the fault."""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch.utils.data import Dataset, IterableDataset

from qlora_compile import errors, row_errors
from qlora_compile.hf.dataset import prepare
from tests.toy_language_model import END, LONGEST, VOCABULARY, toy_tokenizer

CLASSES = 5
Row = dict[str, Any]


class Rows(Dataset):
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Row:
        return self.rows[place]


class Stream(IterableDataset):
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def tensors(rows: list[Row]) -> list[Row]:
    return [{name: torch.tensor(value) for name, value in row.items()} for row in rows]


def arrays(rows: list[Row]) -> list[Row]:
    return [{name: np.asarray(value) for name, value in row.items()} for row in rows]


TYPED = {
    "table": datasets.Dataset.from_list,
    "table in parts": lambda rows: datasets.concatenate_datasets(
        [datasets.Dataset.from_list([row], features=_features(rows)) for row in rows]
    ),
    "table of tensors": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "table with a transform": lambda rows: datasets.Dataset.from_list(rows).with_transform(
        lambda batch: batch
    ),
    "stream of a table": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
}
"""Kinds of dataset whose columns have one type for all rows."""
UNTYPED: dict[str, Callable[[list[Row]], Any]] = {
    "list": lambda rows: rows,
    "generator": iter,
    "list of tensors": tensors,
    "list of arrays": arrays,
    "torch dataset": Rows,
    "torch stream": Stream,
    "frame": pd.DataFrame,
}
KINDS = TYPED | UNTYPED


def _features(rows: list[Row]) -> datasets.Features:
    return datasets.Dataset.from_list(rows).features


_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
    "num_labels": CLASSES,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "encoder_attention_heads": 1,
    "decoder_attention_heads": 1,
}


@dataclass(frozen=True)
class Task:
    """A model class, the label of a row with so many tokens, and the number of labels it knows."""

    architecture: str
    label: Callable[[int], Any]
    known: int | None
    settings: tuple[tuple[str, Any], ...] = ()

    @cache  # noqa: B019
    def model(self) -> Any:
        model_class = getattr(transformers, self.architecture)
        config = model_class.config_class(**_SMALL | dict(self.settings))
        with torch.device("meta"):
            return model_class(config)

    @property
    def longest(self) -> int:
        return LONGEST - 2 if "Roberta" in self.architecture else LONGEST

    def row(self, length: int) -> Row:
        return {"input_ids": list(range(length)), "labels": self.label(length)}


TASKS = {
    "causal": Task("LlamaForCausalLM", lambda n: [-100, *range(n - 1)], VOCABULARY),
    "causal, labels from inputs": Task("LlamaForCausalLM", lambda n: None, None),
    "masked": Task("RobertaForMaskedLM", lambda n: [-100] * n, VOCABULARY, (("pad_token_id", 1),)),
    "tokens": Task("BertForTokenClassification", lambda n: [n % CLASSES] * n, CLASSES),
    "classes": Task("BertForSequenceClassification", lambda n: n % CLASSES, CLASSES),
    "numbers": Task("BertForSequenceClassification", float, None, (("num_labels", 1),)),
    "several": Task("BertForSequenceClassification", lambda n: [0.0, 1.0] + [0.5] * 3, None),
    "sequence": Task("BartForConditionalGeneration", lambda n: [1, 2, 3], VOCABULARY),
}
PER_TOKEN = ("causal", "masked", "tokens")
LABELLED = tuple(name for name in TASKS if name != "causal, labels from inputs")
BOUNDED = tuple(name for name, task in TASKS.items() if task.known is not None)


def _set_token(row: Row, task: Task, by: int) -> object:
    row["input_ids"][-1] = value = VOCABULARY + by if by >= 0 else by
    return value


def _set_label(row: Row, task: Task, by: int) -> object:
    value = int(task.known or 0) + by if by >= 0 else by
    if isinstance(row["labels"], list):
        row["labels"][-1] = value
    else:
        row["labels"] = value
    return value


def _lengthen(row: Row, task: Task, by: int) -> object:
    length = task.longest + 1 + by
    row["input_ids"] = [1] * length
    if isinstance(row.get("labels"), list):
        row["labels"] = task.label(length)
        row["labels"][1:] = row["labels"][:1] * (len(row["labels"]) - 1)
    return f"{length} tokens"


def _replace(name: str, make: Callable[[Row], Any], shown: str) -> Callable[..., object]:
    def replace(row: Row, task: Task, by: int) -> object:
        row[name] = make(row)
        return shown

    return replace


ALL = tuple(TASKS)
Fault = tuple[tuple[str, ...], tuple[int, int], Callable[..., object], type[Exception]]
FAULTS: dict[str, Fault] = {
    "id beyond the vocabulary": (ALL, (0, 2**40), _set_token, row_errors.RowTokenError),
    "negative id": (ALL, (-(2**40), -1), _set_token, row_errors.RowTokenError),
    "too many tokens": (ALL, (0, 9), _lengthen, row_errors.RowLengthError),
    "no tokens": (
        ("causal, labels from inputs", "classes", "sequence"),
        (0, 0),
        _replace("input_ids", lambda row: [], "[]"),
        row_errors.EmptyRowError,
    ),
    "float ids": (
        ALL,
        (0, 0),
        _replace("input_ids", lambda row: [i + 0.5 for i in row["input_ids"]], "0.5"),
        row_errors.RowTypeError,
    ),
    "too many labels": (
        PER_TOKEN,
        (0, 0),
        _replace("labels", lambda row: [*row["labels"], 1], "one for each token"),
        row_errors.ColumnLengthError,
    ),
    "too few labels": (
        (*PER_TOKEN, "several"),
        (0, 0),
        _replace("labels", lambda row: row["labels"][1:], "values instead of"),
        row_errors.ColumnLengthError,
    ),
    "label beyond the known": (BOUNDED, (0, 2**40), _set_label, row_errors.RowLabelError),
    "negative label": (BOUNDED, (-99, -1), _set_label, row_errors.RowLabelError),
    "label that is not a number": (
        ("numbers",),
        (0, 0),
        _replace("labels", lambda row: float("inf"), "inf"),
        row_errors.RowTypeError,
    ),
    "no labels": (
        LABELLED,
        (0, 0),
        _replace("labels", lambda row: None, "has no labels"),
        row_errors.RowColumnsError,
    ),
    "no ids": (
        ALL,
        (0, 0),
        _replace("input_ids", lambda row: None, "has no input_ids"),
        row_errors.RowColumnsError,
    ),
    "a short mask": (
        ALL,
        (0, 0),
        _replace("attention_mask", lambda row: [1] * (len(row["input_ids"]) - 1), "mask holds"),
        row_errors.ColumnLengthError,
    ),
}


def prepared(kind: str, rows: list[Row], task: Task) -> tuple[list[Any], Any]:
    """Return all rows as the Trainer gets them, and what makes batches of them."""
    without_none = [{n: v for n, v in row.items() if v is not None} for row in rows]
    dataset = KINDS[kind](without_none if kind in UNTYPED else rows)
    ready, batching = prepare(dataset, task.model(), toy_tokenizer(), None)
    return list(ready), batching


def drawn_rows(data: st.DataObject, task: Task) -> list[Row]:
    lengths = data.draw(st.lists(st.integers(2, LONGEST - 2), min_size=3, max_size=6))
    rows = [task.row(length) for length in lengths]
    if rows[0]["labels"] is None:
        for row in rows:
            del row["labels"]
    return rows


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(data=st.data())
def test_right_rows_become_batches(kind: str, data: st.DataObject) -> None:
    task = TASKS[data.draw(st.sampled_from(ALL))]
    rows = drawn_rows(data, task)
    ready, batching = prepared(kind, rows, task)
    batch = batching(ready)
    assert batch["input_ids"].dtype == torch.int64
    assert len(batch["input_ids"]) == len(rows)
    floats = task in (TASKS["numbers"], TASKS["several"])
    assert batch["labels"].dtype == (torch.float32 if floats else torch.int64)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_wrong_row_is_one_error_that_names_it(kind: str, data: st.DataObject) -> None:
    fault = data.draw(st.sampled_from(sorted(FAULTS)))
    names, by, break_row, error = FAULTS[fault]
    task = TASKS[data.draw(st.sampled_from(names))]
    rows = drawn_rows(data, task)
    if fault == "a short mask":
        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
    # A list's columns are those of its first row.
    number = data.draw(st.integers(int(error is row_errors.RowColumnsError), len(rows) - 1))
    shown = break_row(rows[number], task, data.draw(st.integers(*by)))
    with pytest.raises(error) as raised:
        prepared(kind, rows, task)
    message = str(raised.value)
    # One float makes all of a typed column floats.
    named = 0 if fault == "float ids" and kind in TYPED else number
    assert message.startswith(f"row {named}")
    assert "; " in message
    assert kind in TYPED or str(shown) in message


def test_labels_that_begin_late_are_one_error() -> None:
    rows = [{"input_ids": [1, 2]}, {"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1, 2]}]
    for kind in UNTYPED:
        with pytest.raises(row_errors.RowColumnsError, match=r"row \d .*labels"):
            prepared(kind, rows, TASKS["causal"])


class Stopped(IterableDataset):
    """A stream with a length and epochs of its own."""

    epoch = 0

    def __iter__(self) -> Iterator[Row]:
        return iter([{"input_ids": [1, 2]}] * 3)

    def __len__(self) -> int:
        return 3

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_checked_stream_stays_the_stream_it_was() -> None:
    stream = Stopped()
    ready, _ = prepare(stream, TASKS["causal"].model(), None, None)
    ready.set_epoch(2)
    assert (len(pickle.loads(pickle.dumps(ready))), stream.epoch) == (3, 2)
    with pytest.raises(TypeError):
        len(prepare(Stream([{"input_ids": [1, 2]}]), TASKS["causal"].model(), None, None)[0])


def tokenizer_that_ends(ends: bool) -> Any:
    tokenizer = toy_tokenizer()
    if ends:
        end = tokenizer.eos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, end)]
        )
    return tokenizer


@pytest.mark.parametrize("task", ["classes", "tokens", "masked"])
def test_a_text_for_other_models_is_what_the_tokenizer_makes_of_it(task: str) -> None:
    labels = {"classes": 1, "tokens": [1, 2], "masked": [-100, 2]}[task]
    for ends in (False, True):
        tokenizer = tokenizer_that_ends(ends)
        labelled = [{"text": "xyz"[: 3 - ends], "labels": labels}]
        limit = 2 + ends if task == "classes" else 2
        rows, _ = prepare(labelled, TASKS[task].model(), tokenizer, limit)
        assert (
            rows[0]["input_ids"]
            == tokenizer(labelled[0]["text"], truncation=True, max_length=limit)["input_ids"]
        )


def test_rows_of_text_are_counted_with_the_blank_ones() -> None:
    task = TASKS["classes"].model()
    rows: list[Row] = [{"text": text, "labels": 0} for text in ("a", " ")]
    with pytest.raises(row_errors.RowTypeError, match="row 2: text is 7"):
        prepare([*rows, {"text": 7}], task, toy_tokenizer(), None)
    with pytest.raises(row_errors.RowColumnsError, match="row 1 has no text"):
        prepare([rows[0], {"input_ids": [1]}], task, toy_tokenizer(), None)
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(VOCABULARY)])
    rows.append({"text": f"<{VOCABULARY - 1}>", "labels": 0})
    with pytest.raises(row_errors.RowTokenError, match=r"row 2: .* ids 0 to 127; use the tok"):
        prepare(rows, task, tokenizer, None)


def test_more_tokens_than_positions_cannot_be_asked_for() -> None:
    for task in TASKS.values():
        with pytest.raises(errors.SequenceLengthError, match=f"at most {task.longest}"):
            prepare(["a"], task.model(), toy_tokenizer(), task.longest + 1)


@pytest.mark.parametrize("labels", [[0, 1, None], [0.5, 1.5, None]])
def test_a_frame_with_a_missing_label_is_that_row_s_error(labels: list[Any]) -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c"], "labels": labels})
    task = TASKS["classes" if labels[0] == 0 else "numbers"]
    with pytest.raises(row_errors.RowColumnsError, match="row 2 has no labels"):
        prepare(frame, task.model(), toy_tokenizer(), None)
