"""`train --preview`, `chat` and `eval`: what they show; and help that fits 80 columns."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import typer
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora_compile import api
from qlora_compile.cli import evaluate, explain
from qlora_compile.cli.app import app
from qlora_compile.cli.preview import LEARNT, as_text
from qlora_compile.cli.train import closing_table
from qlora_compile.hf.loading import compute_dtype
from qlora_compile.report import Report, Site
from qlora_compile.training.adapted import adapter_settings
from tests.hf.trainer.chats import ROWS, turns
from tests.toy_language_model import chat_tokenizer, toy_llama


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an adapter for it, and a file of chats."""
    folder = tmp_path_factory.mktemp("adapter")
    toy_llama(longest=256).save_pretrained(folder / "model")
    chat_tokenizer().save_pretrained(folder / "model")
    chats = [{"messages": turns("say it", "xyz")}, *ROWS["messages"]]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in chats))
    learnt = [{"messages": turns("say it", "xyz")}] * 4
    (folder / "learnt.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in learnt))
    given = ["train", "--model", str(folder / "model"), "--data", str(folder / "learnt.jsonl")]
    given += ["--steps", "8", "--learning-rate", "3e-2", "--held-out", "0", "--format", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "optimize", lambda model, lora, **_: peft.get_peft_model(model, lora))
        patch.setattr(api, "explain", lambda model: Report(()))
        result = CliRunner().invoke(app, [*given, "--output", str(folder / "run")])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled."""
    monkeypatch.setattr(api, "optimize", lambda model, **_: model)


def of_peft(adapter: Path) -> Any:
    """Return model and adapter as stock PEFT loads them, in the dtype that the command takes."""
    base = AutoModelForCausalLM.from_pretrained(adapter / "model", dtype=compute_dtype())
    return peft.PeftModel.from_pretrained(base, str(adapter / "run")).eval()


def answered(model: Any) -> str:
    """Return the most probable nine tokens after a question."""
    tokenizer: Any = chat_tokenizer()
    asked = tokenizer.apply_chat_template(
        turns("say it"), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**asked, max_new_tokens=9, do_sample=False)
    return tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.usefixtures("plain")
def test_chat_answers_as_the_adapter_does(adapter: Path) -> None:
    model = of_peft(adapter)
    answer = answered(model)
    with model.disable_adapter():
        before = answered(model)
    assert answer != before
    given = ["chat", "--adapter", str(adapter / "run"), "--max-tokens", "9"]
    asked = CliRunner().invoke(app, [*given, "--prompt", "say it"])
    assert asked.exit_code == 0, asked.output
    assert asked.stdout == f"> say it\n{answer}\n"
    typed = CliRunner().invoke(app, given, input="say it\nsay it\n\n")
    assert typed.exit_code == 0
    assert typed.stdout.startswith(f"> {answer}\n> ")
    without = CliRunner().invoke(app, [*given, "--prompt", "say it", "--base"])
    assert without.stdout == f"> say it\n{before}\n"


@pytest.mark.usefixtures("plain")
def test_eval_tells_loss_and_perplexity_beside_the_base_model(adapter: Path) -> None:
    given = ["eval", "--adapter", str(adapter / "run"), "--data", str(adapter / "chat.jsonl")]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    figures = json.loads(result.stdout)
    assert figures["sequences"] == 7
    for of in ("before", "after"):
        assert figures[f"{of}_perplexity"] == pytest.approx(math.exp(figures[of]))
    model = of_peft(adapter)
    tokens: Any = chat_tokenizer().apply_chat_template(turns("say it", "xyz"), return_dict=True)
    ids = torch.tensor([tokens["input_ids"]])
    # The answer and its end token; a line break comes after them.
    labels = torch.full_like(ids, -100)
    labels[:, -5:-1] = ids[:, -5:-1]
    one = json.loads(CliRunner().invoke(app, [*given, "--json", "--rows", "1"]).stdout)
    after = model(input_ids=ids, labels=labels).loss.item()
    with model.disable_adapter():
        before = model(input_ids=ids, labels=labels).loss.item()
    assert (one["before"], one["after"]) == pytest.approx((before, after), rel=1e-3)
    assert after < before - 0.2
    table = CliRunner().invoke(app, [*given, "--rows", "2"]).stdout
    assert "with the adapter" in table
    assert "2 rows" in table


BAD: dict[str, tuple[list[str], str]] = {
    "no folder": (["--adapter", "absent"], "'absent': it has no adapter_config.json; pass the"),
    "no adapter": (["--adapter", "{model}"], "has no adapter_config.json"),
    "no model": (["--adapter", "{bare}"], "names no model; pass --model"),
    "no format": (["--adapter", "{bare}", "--model", "{model}"], "it has no run.yaml, which would"),
    "a classifier": (["--adapter", "{classifier}"], "the objective classification trained it with"),
    "a checkpoint of one": (["--adapter", "{classifier}/checkpoint-3"], "load it by peft.Auto"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["chat", "eval"])
def test_a_bad_folder_is_one_line(name: str, command: str, adapter: Path, tmp_path: Path) -> None:
    given, message = BAD[name]
    classifier = tmp_path / "classifier"
    for folder in (tmp_path, classifier, classifier / "checkpoint-3"):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
    (classifier / "run.yaml").write_text("{model: a, data: b, objective: classification}")
    places = {"model": adapter / "model", "bare": tmp_path, "classifier": classifier}
    given = [each.format(**places) for each in given]
    data = ["--data", str(adapter / "chat.jsonl")] if command == "eval" else []
    result = CliRunner().invoke(app, [command, *given, *data])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_checkpoint_has_the_settings_of_its_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    (tmp_path / "run.yaml").write_text("{model: here, data: b, format: int8}")
    found = adapter_settings(checkpoint, None, None)
    assert (found.model, found.format) == ("here", "int8")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "changed",
    [
        {"eval_every": 1, "best_checkpoint": True, "early_stopping": 2},
        {"options": {"eval_strategy": "steps", "eval_steps": 1, "packing": True}},
        {"objective": "dpo", "options": {"beta": 0.2}, "columns": {"prompt": "question"}},
        {"objective": "grpo", "reward": "absent.py:f"},
    ],
)
def test_eval_takes_any_run_of_a_language_model(
    changed: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter / "run", tmp_path / "run")
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump({**settings, **changed}))
    (tmp_path / "tokens.jsonl").write_text('{"input_ids": [5, 6, 7]}')
    for data in (adapter / "chat.jsonl", tmp_path / "tokens.jsonl"):
        given = ["eval", "--adapter", str(tmp_path / "run"), "--data", str(data), "--json"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, (result.output, result.exception)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = of_peft(adapter)(input_ids=ids, labels=ids).loss.item()
    assert json.loads(result.stdout)["after"] == pytest.approx(expected, rel=1e-3)


def test_preview_of_a_run_that_evaluates(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens.jsonl").write_text('{"input_ids": [5, 6, 7]}\n' * 4)
    for data in (adapter / "chat.jsonl", tmp_path / "tokens.jsonl"):
        given = ["train", "--model", str(adapter / "model"), "--data", str(data), "--eval-every"]
        given += ["1", "--best-checkpoint", "--early-stopping", "1", "--preview", "1"]
        shown = CliRunner().invoke(app, [*given, "--output", str(tmp_path / "run")])
        assert shown.exit_code == 0, (shown.output, shown.exception)
        assert "⟦" in shown.stdout


def test_preview_shows_rows_and_what_is_learnt(adapter: Path) -> None:
    given = ["train", "--model", str(adapter / "model"), "--data", str(adapter / "chat.jsonl")]
    given += ["--output", str(adapter / "run"), "--held-out", "0"]  # which an earlier run has
    before = sorted((adapter / "run").rglob("*"))
    shown = CliRunner().invoke(app, [*given, "--preview", "2"])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    end = "<|im_end|>"
    assert f"user\nsay it{end}\n<|im_start|>assistant\n⟦xyz{end}⟧\n" in shown.stdout
    assert f"assistant\n⟦b{end}⟧" in shown.stdout
    assert shown.stdout.count(" row ") == 2
    assert sorted((adapter / "run").rglob("*")) == before


def test_what_is_learnt_is_in_colour() -> None:
    tokenizer = chat_tokenizer()
    ids = tokenizer("abcd")["input_ids"]
    text = as_text({"input_ids": ids, "labels": [-100, -100, *ids[2:]]}, tokenizer, coloured=True)
    assert text.plain == "abcd"
    assert [(s.start, s.end) for s in text.spans if s.style == LEARNT] == [(2, 4)]
    row = {"prompt_ids": ids[:1], "chosen_ids": ids[1:2], "rejected_ids": ids[2:]}
    assert as_text(row, tokenizer, coloured=False).plain == "a⟦b⟧⟦cd⟧"


METRICS: dict[str, Any] = {
    "held_out": {
        "sequences": 64,
        **{name: 12.3456 for name in ("before", "after", "difference")},
        **{f"{name}_standard_error": 0.1234 for name in ("before", "after", "difference")},
    },
    "training": {"tokens_per_second_after_first_step": 123456.7, "first_step_seconds": 1234.5},
    "peak_memory": {"kind": "process memory", "bytes": 2**37},
    "sites": {"fused": 1234, "total": 1234},
}
TIED = "its weight is tied to base_model.model.model.embed_tokens"
ORIGINS = ("quantised here", "compressed-tensors checkpoint")


def sites(origins: Sequence[str | None]) -> Report:
    """Return sites that are equal except for where their weights come from."""
    name = "base_model.model.model.layers.{}.self_attn.q_proj"
    shape: Any = (False, "nf4", 4096, 4096, 16, TIED)
    return Report(
        tuple(Site(name.format(n), *shape, origin=origin) for n, origin in enumerate(origins))
    )


COMMANDS: Any = getattr(typer.main.get_command(app), "commands")  # noqa: B009
TABLES = {
    "train": (closing_table(METRICS, Path("a-folder-with-a-long-name")), "12.3456 ± 0.1234"),
    "explain": (explain.grouped_table(sites(ORIGINS[1:] * 2)), ORIGINS[1]),
    "eval": (
        evaluate.figures_table(
            {**METRICS["held_out"], "before_perplexity": 1e4, "after_perplexity": 1e4}
        ),
        "10000.000",
    ),
}


def shown(table: Any) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_one_line_for_equal_sites_says_where_their_weights_come_from() -> None:
    text = shown(explain.grouped_table(sites([*ORIGINS[:1] * 30, *ORIGINS[1:] * 2, None])))
    rows = re.findall(r"^ *(\d+) .*nf4( \(\d\))?  .*not fused \((\d)\)", text, re.M)
    assert rows == [("30", " (1)", "2"), ("2", " (3)", "2"), ("1", "", "2")]
    notes = [line.strip() for line in text.splitlines() if line.startswith("(")]
    assert notes == [f"(1) {ORIGINS[0]}", f"(2) {TIED}", f"(3) {ORIGINS[1]}"]


@pytest.mark.parametrize("command", TABLES)
def test_tables_are_whole_in_80_columns(command: str) -> None:
    table, cell = TABLES[command]
    text = shown(table)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert cell in text


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_whole_in_80_columns(command: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    given = [] if command is None else [command]
    result = CliRunner().invoke(app, [*given, "--help"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stdout).split())
    for option in re.findall(r"--[a-z-]+", words):
        assert not option.endswith("-")
    assert "help" in words
