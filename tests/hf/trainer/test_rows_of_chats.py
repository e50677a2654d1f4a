"""Rows of every kind: token ids and labels are TRL's own, and a wrong cell is one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_compile.data_errors import (
    ColumnNameError,
    DataColumnsError,
    DataRowError,
    NothingLearntError,
    ObjectiveRowsError,
)
from qlora_compile.errors import EmptyDatasetError, OutOfRangeError, TokenizerMissingError
from qlora_compile.hf.dataset import rows_of
from qlora_compile.hf.trainer.objectives.registry import OBJECTIVES, objective_named
from qlora_compile.hf.trainer.preparation import TrainingRows, enough_rows, training_rows
from qlora_compile.hf.trainer.row_checks import _suspects, fault
from qlora_compile.hf.trainer.row_kinds import ROW_KINDS
from qlora_compile.hf.training import FineTuning
from tests.examples import examples
from tests.hf.trainer.chats import LENGTH, ROWS, of_trl, small_model, turns
from tests.toy_language_model import chat_tokenizer, toy_tokenizer

SFT = objective_named("sft")
TRL_S = {
    "text": {},
    "messages": {"assistant_only_loss": True},
    "system": {"assistant_only_loss": True},
    "completion": {},
    "turns of a completion": {},
}
"""Kinds of rows that TRL's SFT trainer takes as they are, and its options for them."""
PACKED = {"packing": True, "max_length": LENGTH}


def tokens(rows: Any, tokenizer: Any = None, **options: Any) -> list[Any]:
    length = options.pop("max_length", LENGTH)
    tuning = FineTuning(
        small_model(),
        rows,
        tokenizer=tokenizer or chat_tokenizer(),
        max_length=length,
        options=options,
    )
    return list(tuning.trainer.train_dataset)


@pytest.mark.parametrize("kind", TRL_S)
@pytest.mark.parametrize("options", [{}, {"packing": True}, {"max_length": 150}])
def test_tokens_and_labels_are_trl_s(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = of_trl(ROWS[kind], tmp_path, **{**TRL_S[kind], **options})
    found = tokens(ROWS[kind], **options)
    for column in ("input_ids", "labels", *(("seq_lengths",) if "packing" in options else ())):
        assert [row[column] for row in found] == [row[column] for row in expected]


def learnt(row: Any, tokenizer: Any) -> str:
    return tokenizer.decode([token for token in row["labels"] if token != -100])


def test_what_is_learnt_ends() -> None:
    tokenizer = chat_tokenizer()
    end = tokenizer.eos_token
    assert learnt(tokens(ROWS["text"])[0], tokenizer) == f"text 0{end}"
    assert learnt(tokens(ROWS["messages"])[2], tokenizer) == f"aab{end}x{end}"
    assert learnt(tokens(ROWS["completion"])[2], tokenizer) == f"c2{end}"
    whole = tokens(ROWS["messages"], assistant_only_loss=False)[0]
    assert whole["labels"] == whole["input_ids"]


def test_kinds_of_other_projects_become_trl_s(tmp_path: Path) -> None:
    named = {"user": "human", "assistant": "gpt"}
    shared = [
        {
            "conversations": [
                {"from": named[t["role"]], "value": t["content"]} for t in row["messages"]
            ]
        }
        for row in ROWS["messages"]
    ]
    assert tokens(shared) == tokens(ROWS["messages"])
    rows = [{"instruction": "Add.", "input": i, "output": "3"} for i in ("1 2", "", None)]
    asked = ["Add.\n\n1 2", "Add.", "Add."]
    chats = [{"prompt": turns(text), "completion": turns("", "3")[1:]} for text in asked]
    assert tokens(rows) == tokens(chats)
    plain = [{"prompt": f"{text}\n\n", "completion": "3"} for text in asked]
    assert tokens(rows, toy_tokenizer()) == tokens(plain, toy_tokenizer())
    found = rows_of([{"question": "a", "text": "b"}], {"prompt": "question", "completion": "text"})
    assert found.table.to_list() == [{"prompt": "a", "completion": "b"}]


def test_packed_rows_do_not_see_each_other() -> None:
    import torch

    tuning = FineTuning(
        small_model().eval(),
        ROWS["text"],
        tokenizer=chat_tokenizer(),
        max_length=LENGTH,
        options={"packing": True, "max_steps": 1},
    )
    trainer = tuning.trainer
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():
        together = trainer.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits[0]
        start = 0
        for length in trainer.train_dataset[0]["seq_lengths"]:
            ids = batch["input_ids"][:, start : start + length]
            alone = trainer.model(input_ids=ids, use_cache=False).logits[0]
            torch.testing.assert_close(together[start : start + length], alone, atol=1e-5, rtol=0)
            start += length
    assert len(trainer.train_dataset[0]["seq_lengths"]) > 2


def test_a_dataset_of_each_kind_is_taken_by_an_objective() -> None:
    assert {kind.name for kind in ROW_KINDS} == {k for each in OBJECTIVES for k in each.kinds}
    for objective, rows in (
        ("sft", "judged"),  # a completion, whatever the label
        ("dpo", "turns of a preference"),
        ("kto", "judged"),
        ("orpo", "preference"),
        ("grpo", "prompt"),
        ("reward", "preference"),
        ("classification", "classes"),
        ("sft", "classes"),  # a text, whatever the label
    ):
        found = training_rows(ROWS[rows], objective_named(objective))
        assert len(found.table) == len(ROWS[rows])
        assert found.kind.name in objective_named(objective).kinds
    assert "answer" in training_rows(ROWS["prompt"], objective_named("grpo")).table.column_names
    with pytest.raises(ObjectiveRowsError, match="'preference', but the objective 'sft' trains on"):
        training_rows(ROWS["preference"], SFT)
    with pytest.raises(DataColumnsError, match=r"the columns a, b, which .* --columns NAME=OWN"):
        training_rows([{"a": 1, "b": 2}], SFT)


def test_columns_that_cannot_be_renamed() -> None:
    with pytest.raises(ColumnNameError, match=r"no column 'b'; use one of a"):
        rows_of([{"a": "x"}], {"text": "b"})
    with pytest.raises(ColumnNameError, match=r"txt='a' .*no kind of row has this column"):
        rows_of([{"a": "x"}], {"txt": "a"})


GOOD = turns("q", "a")
BAD_CELLS: list[tuple[str, Any, str]] = [
    ("text", {"text": 7}, "text is 7; write a string"),
    ("messages", {"messages": []}, r"messages is \[\]; write turns"),
    ("messages", {"messages": None}, "messages is None; write turns"),
    ("messages", {"messages": "a"}, "messages is 'a'; write turns"),
    ("messages", {"messages": GOOD[:1]}, "with no turn of the assistant; add the answer"),
    ("messages", {"messages": [{"role": None, "content": "a"}]}, "turn 0 has no role; write user"),
    ("messages", {"messages": [GOOD[0], {"role": "assistant"}]}, "turn 1 has no content; write"),
    ("completion", {"prompt": "a", "completion": " "}, "completion is ' '; write an answer"),
    ("completion", {"prompt": None, "completion": "b"}, "prompt is None; write a string"),
    ("turns of a completion", {"prompt": GOOD[:1], "completion": "b"}, "is 'b'; write turns"),
    ("judged", {"prompt": "a", "completion": "b", "label": None}, "label is None; give the row"),
]


@pytest.mark.parametrize(("kind", "row", "message"), BAD_CELLS)
def test_a_bad_cell_names_file_row_value_and_remedy(
    kind: str, row: Any, message: str, tmp_path: Path
) -> None:
    objective = objective_named("kto" if kind == "judged" else "sft")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, rows in zip(files, (ROWS[kind], [*ROWS[kind], row, *ROWS[kind]]), strict=True):
        file.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    site = f"b.jsonl, row {len(ROWS[kind]) + 1}: "
    for paths in (files[1:], files):
        with pytest.raises(DataRowError, match=f"{site}.*{message}"):
            training_rows(paths, objective)
    rows = [*ROWS[kind], row]
    streamed = datasets.IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(DataRowError, match=f"the dataset, row {len(rows) - 1}: .*{message}"):
        list(training_rows(streamed, objective).table)


def test_blank_texts_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("a", " ", "", "b")]
    assert training_rows(rows, SFT).table["text"][:] == ["a", "b"]
    with pytest.raises(EmptyDatasetError, match="no examples"):
        training_rows(rows[1:3], SFT)


TEXTS = st.none() | st.sampled_from(["", " ", "a", "\u3000", "ünï"])
TURN = st.fixed_dictionaries(
    {"role": st.none() | st.sampled_from(["", "user", "assistant"]), "content": TEXTS}
)


@settings(max_examples=examples(45))
@given(
    cells=st.lists(TEXTS, min_size=1, max_size=5)
    | st.lists(st.none() | st.lists(TURN, max_size=3), min_size=1, max_size=5),
    is_answer=st.booleans(),
    start=st.integers(0, 2),
)
def test_arrow_suspects_every_cell_that_is_at_fault(
    cells: list[Any], is_answer: bool, start: int
) -> None:
    is_text = any(isinstance(cell, str) for cell in cells)
    holds: Any = "text" if is_text else "turns"
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    column = datasets.Value("string") if is_text else datasets.List(turn)
    if not is_text and not any(cells):
        cells = [*cells, GOOD]
    features = datasets.Features({"x": column})
    table = datasets.Dataset.from_dict({"x": cells}, features=features)
    table = table.select(range(min(start, len(cells) - 1), len(cells)))
    cells = cells[min(start, len(cells) - 1) :]
    suspects = set(_suspects(table, "x", holds, is_answer))
    wrong = {n for n, cell in enumerate(cells) if fault(cell, holds, is_answer) is not None}
    assert wrong <= suspects
    fine = {n for n, cell in enumerate(cells) if n not in wrong and (not is_text or cell.strip())}
    assert not fine & suspects


class Arguments:
    max_steps, train_batch_size, world_size, gradient_accumulation_steps, seed = 5, 4, 1, 2, 0


def test_a_few_steps_take_a_part_of_many_rows() -> None:
    table = datasets.Dataset.from_dict({"text": [f"text {n}" for n in range(5000)]})
    rows = training_rows(table, SFT)
    kept = enough_rows(rows, Arguments())
    assert len(kept.table) == 1024
    assert kept.table["text"][:] == enough_rows(rows, Arguments()).table["text"][:]
    assert set(kept.table["text"]) <= set(table["text"])
    whole = Arguments()
    whole.max_steps = -1
    assert len(enough_rows(rows, whole).table) == 5000
    assert isinstance(kept, TrainingRows)


def test_what_cannot_be_trained_on_is_said_first() -> None:
    with pytest.raises(NothingLearntError, match="max_length=20 tokens; pass a larger"):
        tokens(ROWS["messages"], max_length=20)
    stream = datasets.Dataset.from_list(ROWS["text"]).to_iterable_dataset()
    with pytest.raises(OutOfRangeError, match=r"max_steps=-1 .* a stream"):
        tokens(stream)
    with pytest.raises(TokenizerMissingError, match="tokenizer="):
        FineTuning(small_model(), ROWS["text"], options={})
