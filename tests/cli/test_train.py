"""`qlora-compile train`: the files of a run, resuming, and every bad input in one line."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from typer.testing import CliRunner

import qlora_compile
from qlora_compile import api
from qlora_compile.cli.app import app
from qlora_compile.hf.trainer.objectives.registry import OBJECTIVES
from qlora_compile.hf.training import FineTuning, StepObserver
from qlora_compile.training import loss_curve
from qlora_compile.training import run as training_run
from tests.hf.trainer.chats import ROWS
from tests.interrupts import interruptible
from tests.toy_language_model import (
    LONGEST,
    chat_tokenizer,
    toy_bert,
    toy_llama,
    toy_tokenizer,
)

__all__ = ["interruptible"]

ROOT = Path(__file__).parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass
class NothingFused:
    sites: list[Any] = field(default_factory=list)

    def to_json(self) -> str:
        return "{}"


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters by PEFT, nothing quantised or compiled: these tests are about the rest."""

    def optimize(model: Any, lora: Any, **options: Any) -> Any:
        return peft.get_peft_model(model, lora)

    monkeypatch.setattr(api, "optimize", optimize)
    monkeypatch.setattr(api, "explain", lambda model: NothingFused())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a classifier and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    toy_llama().save_pretrained(folder / "model")
    toy_tokenizer().save_pretrained(folder / "model")
    toy_bert().save_pretrained(folder / "classifier")
    paragraphs = [f"{n} brown foxes jump over {n + 1} lazy dogs." for n in range(10, 50)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    return folder


def arguments(inputs: Path, output: Path | str, **changed: Any) -> list[str]:
    options = {
        "model": inputs / "model",
        "data": inputs / "text.txt",
        "output": output,
        "rank": 4,
        "steps": 6,
        "max-length": 64,
        "batch-size": 2,
        "learning-rate": 1e-2,
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    given = ["train"]
    for name, value in options.items():
        if value is True:
            given.append(f"--{name}")
        elif value is not None:
            given += [f"--{name}", str(value)]
    return given


def losses(output: Path) -> list[float]:
    figures = json.loads((output / "metrics.json").read_text())["training"]
    assert [entry["step"] for entry in figures["losses"]] == list(
        range(1, len(figures["losses"]) + 1)
    )
    return [entry["loss"] for entry in figures["losses"]]


def test_a_run_through_the_compiler_leaves_everything_behind(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "run"
    result = CliRunner().invoke(app, arguments(inputs, output, steps=12))
    assert result.exit_code == 0, result.output
    for row in ("held-out loss", "→", "tokens per second", "14 of 15"):
        assert row in result.stdout
    assert "Traceback" not in result.stderr

    metrics = json.loads((output / "metrics.json").read_text())
    held_out = metrics["held_out"]
    assert held_out["difference"] < -5 * held_out["difference_standard_error"]
    assert len(losses(output)) == 12
    assert metrics["training"]["tokens_per_second_after_first_step"] > 0
    trainer = json.loads((output / "trainer.json").read_text())
    assert (trainer["max_steps"], trainer["per_device_train_batch_size"]) == (12, 2)
    assert metrics["peak_memory"]["bytes"] > 2**27
    report = json.loads((output / "report.json").read_text())
    assert sum(site["fused"] for site in report["sites"]) == metrics["sites"]["fused"] == 14

    png = (output / "loss.png").read_bytes()
    assert png.startswith(PNG_SIGNATURE)
    assert len(png) > 10_000
    assert AutoTokenizer.from_pretrained(output).eos_token == toy_tokenizer().eos_token
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    adapted = peft.PeftModel.from_pretrained(base, str(output)).eval()
    ids = torch.tensor([toy_tokenizer()("3 brown foxes jump over 4 lazy dogs.")["input_ids"]])
    with torch.no_grad():
        loss = adapted(input_ids=ids, labels=ids).loss
        with adapted.disable_adapter():
            assert loss < adapted(input_ids=ids, labels=ids).loss - 0.2


@pytest.mark.usefixtures("stock")
def test_an_interrupted_run_resumes_to_the_same_losses(inputs: Path, tmp_path: Path) -> None:
    changed = {"steps": 10, "dropout": 0.1, "checkpoint_every": 5, "format": "none"}
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    assert CliRunner().invoke(app, arguments(inputs, whole, **changed)).exit_code == 0
    shutil.copytree(whole, interrupted)
    shutil.rmtree(interrupted / "checkpoint-10")
    (interrupted / "metrics.json").unlink()
    result = CliRunner().invoke(app, arguments(inputs, interrupted, resume=True, **changed))
    assert result.exit_code == 0, result.output
    assert losses(interrupted) == losses(whole)
    figures = [json.loads((run / "metrics.json").read_text()) for run in (whole, interrupted)]
    assert figures[0]["held_out"] == figures[1]["held_out"]
    assert figures[1]["training"]["steps_timed"] == 5


@pytest.mark.usefixtures("stock", "interruptible")
@pytest.mark.parametrize(
    ("number", "presses"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)]
)
def test_a_signal_is_one_line_and_resume_goes_on(
    number: signal.Signals,
    presses: int,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed: Any = {"steps": 6, "dropout": 0.1, "checkpoint_every": 2, "format": "none"}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert CliRunner().invoke(app, arguments(inputs, whole, **changed)).exit_code == 0

    def press(observer: StepObserver, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            for _press in range(presses):
                signal.raise_signal(number)

    with monkeypatch.context() as pressed:
        pressed.setattr(StepObserver, "on_step_begin", press)
        result = CliRunner().invoke(app, arguments(inputs, stopped, **changed))
    assert result.exit_code == 128 + (signal.SIGINT if presses == 2 else number)
    saved = stopped / f"checkpoint-{4 - presses}"
    *_, line = result.stderr.splitlines()
    assert line == f"stopped: {saved} holds adapter and training state; --resume goes on from there"
    assert "Traceback" not in result.output
    resumed = CliRunner().invoke(app, arguments(inputs, stopped, resume=True, **changed))
    assert resumed.exit_code == 0, resumed.output
    assert losses(stopped) == losses(whole)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_before_training_saves_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training_run, "with_held_out", press)
    result = CliRunner().invoke(app, arguments(inputs, tmp_path / "run"))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "stopped: nothing was saved"


@pytest.mark.usefixtures("stock")
def test_a_finished_run_goes_on_or_is_replaced_only_when_asked(
    inputs: Path, tmp_path: Path
) -> None:
    def run(**changed: Any) -> Any:
        return CliRunner().invoke(app, arguments(inputs, tmp_path, **changed))

    assert run(steps=2).exit_code == 0
    for changed, problem in (
        ({}, "--resume continues that run, --overwrite replaces it"),
        ({"resume": True}, "step 2 of 2 is done already"),
        ({"resume": True, "rank": 8, "steps": 4}, "the run had rank=4, not 8"),
        ({"resume": True, "overwrite": True, "steps": 4}, "pass one of the two"),
    ):
        refused = run(**{"steps": 2, **changed})
        assert refused.exit_code == 2
        assert problem in refused.stderr
    assert run(steps=4, resume=True).exit_code == 0
    assert len(losses(tmp_path)) == 4
    assert run(steps=2, overwrite=True, rank=8).exit_code == 0
    assert len(losses(tmp_path)) == 2
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("left", ["metrics.json", "adapter_config.json"])
def test_results_without_checkpoints_are_replaced_only_when_asked(
    left: str, inputs: Path, tmp_path: Path
) -> None:
    own = [tmp_path / "checkpoint-best", tmp_path / "checkpoint-1.tar"]
    own[0].mkdir()
    own[1].write_text("")
    (tmp_path / left).write_text("{}")
    refused = CliRunner().invoke(app, arguments(inputs, tmp_path, steps=1))
    assert refused.exit_code == 2
    assert "it holds the results of an earlier training; --overwrite" in refused.stderr
    assert (tmp_path / left).read_text() == "{}"
    done = CliRunner().invoke(app, arguments(inputs, tmp_path, steps=1, overwrite=True))
    assert done.exit_code == 0, done.output
    assert all(each.exists() for each in own)


@pytest.mark.usefixtures("stock", "interruptible")
def test_a_replaced_run_that_is_stopped_leaves_no_earlier_adapter(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CliRunner().invoke(app, arguments(inputs, tmp_path, steps=1)).exit_code == 0

    def press(*_: Any, **__: Any) -> None:
        for _press in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StepObserver, "on_step_begin", press)
    changed: Any = {"steps": 1, "format": "int8", "overwrite": True}
    assert CliRunner().invoke(app, arguments(inputs, tmp_path, **changed)).exit_code == 130
    assert not list(tmp_path.glob("adapter*"))


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("targets", ["q_proj", "q_proj,v_proj", "all-linear"])
def test_targets_are_names(targets: str, inputs: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, arguments(inputs, tmp_path / "run", steps=1, targets=targets))
    assert result.exit_code == 0, result.output
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    found = set(adapter["target_modules"])
    if targets == "all-linear":
        assert {name.rpartition(".")[2] for name in found} > {"q_proj", "down_proj"}
    else:
        assert found == {*targets.split(",")}


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("option", ["logging_steps=10", "logging_strategy=no"])
def test_a_run_that_logs_no_loss_ends(option: str, inputs: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, arguments(inputs, tmp_path / "run", steps=2, set=option))
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "run") == []
    assert (tmp_path / "run" / "loss.png").is_file()


@pytest.mark.usefixtures("stock")
def test_the_saved_tokenizer_has_the_chat_template_of_the_run(inputs: Path, tmp_path: Path) -> None:
    template = str(chat_tokenizer().chat_template)
    (tmp_path / "template.jinja").write_text(template)
    rows = ROWS["messages"]
    (tmp_path / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    toy_llama(longest=256).save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    changed = {"data": tmp_path / "chat.jsonl", "steps": 1, "held_out": 0, "max_length": 256}
    changed |= {"set": f"chat_template_path={tmp_path}/template.jinja"}
    changed |= {"model": tmp_path / "model"}
    result = CliRunner().invoke(app, arguments(inputs, tmp_path / "run", **changed))
    assert result.exit_code == 0, result.output
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == template


@pytest.mark.usefixtures("stock")
def test_epochs_that_end_within_one_are_not_trained_again(inputs: Path, tmp_path: Path) -> None:
    changed: Any = {"steps": None, "epochs": 1.3, "scheduler": "constant"}
    assert CliRunner().invoke(app, arguments(inputs, tmp_path, **changed)).exit_code == 0
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()
    count = len(losses(tmp_path))
    resumed = CliRunner().invoke(app, arguments(inputs, tmp_path, resume=True, **changed))
    assert resumed.exit_code == 0, resumed.output
    assert len(losses(tmp_path)) == count
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.usefixtures("stock")
def test_the_same_seed_gives_the_same_losses(inputs: Path, tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        changed = {"seed": seed, "steps": 3, "held_out": 0}
        result = CliRunner().invoke(app, arguments(inputs, tmp_path / name, **changed))
        assert result.exit_code == 0, result.output
        assert "held-out" not in result.stdout
        runs[name] = losses(tmp_path / name)
    assert runs["a"] == runs["b"] != runs["c"]


@pytest.mark.usefixtures("stock")
def test_the_written_settings_repeat_the_run(inputs: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    changed = {
        "steps": 4,
        "dropout": 0.1,
        "seed": 3,
        "eval_every": 2,
        "best_checkpoint": True,
        "early_stopping": 9,
        "accumulation": 2,
        "scheduler": "cosine",
        "weight_decay": 0.1,
        "targets": "q_proj,v_proj",
        "rank_pattern": "v_proj=2",
        "rslora": True,
        "packing": True,
        "set": "adam_beta2=0.99",
        "format": "none",
    }
    result = CliRunner().invoke(app, arguments(inputs, first, **changed))
    assert result.exit_code == 0, result.output
    trainer = json.loads((first / "trainer.json").read_text())
    for name, value in {
        "adam_beta2": 0.99,
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
        "load_best_model_at_end": True,
        "eval_steps": 2,
        "weight_decay": 0.1,
        "packing": True,
        "seed": 3,
    }.items():
        assert trainer[name] == value, name
    adapter = json.loads((first / "adapter_config.json").read_text())
    assert (adapter["rank_pattern"], adapter["use_rslora"]) == ({"v_proj": 2}, True)
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}
    given = ["train", "--config", str(first / "run.yaml"), "--output", str(again)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    figures = [json.loads((run / "metrics.json").read_text()) for run in (first, again)]
    assert figures[0]["held_out"] == figures[1]["held_out"]
    assert losses(first) == losses(again)
    settings = [run["settings"] for run in figures]
    assert settings[0].pop("output") != settings[1].pop("output")
    assert settings[0] == settings[1]


BAD_SETTINGS = {
    "rang: 4": "'rang' is not a setting; the nearest is rank",
    "rank: four": "rank is 'four' and no int",
    "packing: 3": "packing is 3 and no bool | None",
    "- a": "it holds no settings",
    "a: [": "while parsing",
}


@pytest.mark.parametrize("text", BAD_SETTINGS)
def test_a_bad_file_of_settings_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2
    assert BAD_SETTINGS[text] in result.stderr
    missing = CliRunner().invoke(app, ["train", "--data", "x.jsonl"])
    assert "--model is missing; pass it" in missing.stderr


def test_a_wrong_path_is_told_within_a_second() -> None:
    given = [sys.executable, "-X", "importtime", "-m", "qlora_compile.cli.app", "train"]
    for wrong in (["--model", "demo", "--data", "absent.jsonl"], ["--config", "absent.yaml"]):
        done = subprocess.run([*given, *wrong], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert "absent" in done.stderr.splitlines()[-1]
        # Without these libraries it takes a third of a second on an idle machine.
        for library in ("torch", "transformers", "datasets", "trl", "peft"):
            assert f" {library}\n" not in done.stderr


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == qlora_compile.__version__


@pytest.mark.parametrize("objective", [o.name for o in OBJECTIVES if o.name != "sft"])
def test_every_objective_runs(objective: str, inputs: Path, tmp_path: Path, stock: None) -> None:
    kinds = {"kto": "judged", "grpo": "prompt", "classification": "classes"}
    rows = ROWS[kinds.get(objective, "preference")]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def length(completions, answer, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    changed = {"objective": objective, "steps": 1, "format": "none", "max_length": None}
    changed |= {"data": tmp_path / "rows.jsonl", "held_out": 0.34}
    if objective == "grpo":
        changed |= {"reward": f"{tmp_path}/rewards.py:length", "set": "max_completion_length=4"}
        changed |= {"held_out": 0, "batch_size": 8}
    result = CliRunner().invoke(app, arguments(inputs, tmp_path / "run", **changed))
    assert result.exit_code == 0, (result.output, result.exception)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["training"]["losses"]) == 1
    assert metrics["held_out"].get("sequences") == (None if objective == "grpo" else 1)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("labels", [("common", "rare"), (0, 1)])
def test_a_class_may_occur_once(labels: tuple[Any, Any], inputs: Path, tmp_path: Path) -> None:
    for place in range(6):  # one of them is held out
        rows = [{"text": f"t{n}", "label": labels[n == place]} for n in range(6)]
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        changed = {"objective": "classification", "steps": 1, "data": tmp_path / "rows.jsonl"}
        given = arguments(inputs, tmp_path / str(place), **changed)
        shown = CliRunner().invoke(app, [*given, "--preview", "1"])
        assert shown.exit_code == 0, (shown.output, shown.exception)
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, (result.output, result.exception)
        score = load_file(tmp_path / str(place) / "adapter_model.safetensors")
        (head,) = (weight for name, weight in score.items() if "score" in name)
        assert head.shape[0] == 2


@pytest.mark.parametrize(("length", "cut"), [(None, 1024), (8, 8)])
def test_texts_of_classes_are_cut_as_the_help_says(length: int | None, cut: int) -> None:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "max_position_embeddings": 4096, "pad_token_id": 0}
    rows = [{"text": "a fox " * 3000, "label": n % 2} for n in range(2)]
    tuning = FineTuning(
        LlamaForSequenceClassification(LlamaConfig(vocab_size=512, **sizes)),
        rows,
        objective="classification",
        tokenizer=toy_tokenizer(),
        max_length=length,
        options={},
    )
    assert {len(row["input_ids"]) for row in tuning.trainer.train_dataset} == {cut}


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing text": ({"data": "absent.txt"}, "'absent.txt': the file does not exist"),
    "a folder without data": ({"data": "{tmp}/nothing"}, "no saved dataset and no file"),
    "blank text": ({"data": "{tmp}/empty.txt"}, "holds no examples; pass at least one"),
    "one document": ({"data": "{tmp}/one.txt"}, "--held-out (0 for none)"),
    "an unknown ending": ({"data": "{tmp}/text.pdf"}, "'.pdf' is unknown; rename the file to one"),
    "an unknown objective": ({"objective": "sftt"}, "choose one of sft, dpo"),
    "rows of another objective": ({"objective": "dpo"}, "of the kind 'text', but the objective"),
    "an unknown option": ({"set": "adam_betta1=1"}, "SFTConfig has adam_beta1"),
    "a scheduler that is none": ({"scheduler": "cosin"}, "lr_scheduler_type='cosin': cosin is not"),
    "an optimizer that is none": ({"optimizer": "adamw8"}, "optim='adamw8': adamw8 is not a valid"),
    "a text for a number": ({"set": "adam_beta1=high"}, "adam_beta1='high': it is no float"),
    "values that do not fit": ({"set": "load_best_model_at_end=true"}, "to match"),
    "a report to nobody": ({"report_to": "wandbb"}, "report_to='wandbb': wandbb is not supported"),
    "a rank that is none": ({"rank_pattern": "q_proj=a"}, "--rank-pattern q_proj='a' is out of"),
    "an option without a value": ({"set": "adam_beta1"}, "--set: 'adam_beta1' is not of"),
    "no reward": ({"objective": "grpo", "data": "{tmp}/prompts.jsonl"}, "is needed for grpo"),
    "a reward that is missing": (
        {"objective": "grpo", "data": "{tmp}/prompts.jsonl", "reward": "nothing.py:f"},
        "'nothing.py:f': not found",
    ),
    "chat without a template": ({"data": "{tmp}/chat.jsonl"}, "has no chat template; take"),
    "a column that is missing": ({"columns": "text=body"}, "has no column 'body'; use one of"),
    "no column of ours": ({"columns": "txet=text"}, "no kind of row has this column; use one of"),
    "missing model": ({"model": "./absent"}, "'./absent': the folder does not exist"),
    "missing gguf": ({"model": "absent.gguf"}, "the file does not exist"),
    "model is a file": ({"model": "{inputs}/text.txt"}, "this is a file"),
    "folder without model": ({"model": "{inputs}"}, "no config.json"),
    "a classifier": ({"model": "{inputs}/classifier"}, "BertForSequenceClassification"),
    "model without tokenizer": ({"model": "{tmp}/bare"}, "no tokenizer"),
    "output is a file": ({"output": "{inputs}/text.txt"}, "this is a file"),
    "output below a file": ({"output": "{inputs}/text.txt/run"}, "is a file"),
    "output on a kernel file system": ({"output": "/proc/run"}, "cannot write to '/proc/run'"),
    "format misspelt": (
        {"format": "nf-4"},
        "nearest is nf4 or nvfp4; choose one of nf4, fp4",
    ),
    "format unlike any": ({"format": "q"}, "the nearest is none;"),
    "another format's option": ({"format": "nf4:group_size=64"}, "group_size='64': neither"),
    "a format's option without a value": ({"format": "int4:zeros"}, "'zeros' is not option=value"),
    "a value of a format's option": (
        {"format": "int4:group_size=48"},
        "group_size=48 is not possible",
    ),
    "an option of no format": ({"format": "none:zeros=float"}, "the format 'none' has such"),
    "a block size": ({"block_size": 63}, "block_size=63 is not a power of two"),
    "a size of no format's": ({"block_size": 64, "format": "int4"}, "block_size"),
    "no regular expression": ({"rank_pattern": "(q=2"}, "rank_pattern='(q' cannot be used"),
    "rank": ({"rank": 0}, "rank=0 is out of range"),
    "alpha": ({"alpha": 0}, "alpha=0.0 is out of range"),
    "dropout": ({"dropout": 1}, "dropout=1.0 is out of range"),
    "steps": ({"steps": 0}, "--steps=0 is out of range"),
    "batch size": ({"batch_size": 0}, "--batch-size=0"),
    "learning rate": ({"learning_rate": "nan"}, "--learning-rate=nan"),
    "held-out": ({"held_out": 1}, "--held-out=1.0"),
    "seed": ({"seed": -1}, "--seed=-1"),
    "rows too long": ({"max_length": LONGEST + 1}, f"use at most {LONGEST}"),
    "rows too short": ({"max_length": 1}, "--max-length=1"),
    "evaluation without rows": ({"held_out": 0, "eval_every": 1}, "--held-out=0.0 is out of range"),
    "the best without rows": (
        {"held_out": 0, "best_checkpoint": True},
        "above 0 with --eval-every",
    ),
    "stopping without rows": ({"held_out": 0, "early_stopping": 1}, "or --early-stopping"),
    "a length that grpo lacks": (
        {"objective": "grpo", "data": "{tmp}/prompts.jsonl", "reward": "{tmp}/r.py:f"},
        "GRPOConfig",
    ),
    "a classifier of tokens without labels": (
        {"objective": "classification", "data": "{tmp}/tokens.jsonl"},
        "the dataset has input_ids; add label",
    ),
    "nothing to resume": ({"resume": True}, "it holds no checkpoint"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_is_one_line_and_changes_nothing(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("qlora_compile.hf.loading.load_model", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text.pdf").write_text("a")
    (tmp_path / "r.py").write_text(
        "def f(completions, **_):\n    return [0.0] * len(completions)\n"
    )
    (tmp_path / "tokens.jsonl").write_text('{"input_ids": [1, 2]}\n' * 4)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 4)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    (tmp_path / "one.txt").write_text("word " * 200)
    shutil.copytree(inputs / "model", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    changed, message = BAD_INPUTS[name]
    filled = {
        option: value.format(inputs=inputs, tmp=tmp_path) if isinstance(value, str) else value
        for option, value in changed.items()
    }
    output = filled.pop("output", tmp_path / "run")
    result = CliRunner().invoke(app, arguments(inputs, output, **filled))
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_rank_for_nothing_is_one_line(inputs: Path, tmp_path: Path) -> None:
    given = arguments(inputs, tmp_path / "run", rank_pattern="qproj=2")
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert "rank_pattern='qproj' cannot be used; name some" in result.stderr


def test_a_real_bug_keeps_its_traceback(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(training_run, "with_held_out", broken)
    result = CliRunner().invoke(app, arguments(inputs, tmp_path / "run"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_without_matplotlib_nothing_starts(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_curve, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, arguments(inputs, tmp_path / "run"))
    assert result.exit_code == 2
    assert "pip install 'qlora-compile[train]'" in result.stderr


def test_explain_prints_the_report_without_training(inputs: Path) -> None:
    given = ["explain", "--model", str(inputs / "model"), "--format", "int8", "--rank", "2"]
    table = CliRunner().invoke(app, given, env={"COLUMNS": "120"})
    assert table.exit_code == 0, table.output
    assert "model.layers.*.mlp.down_proj" in table.stdout
    assert re.search(r"^\s*2\s.*int8 \(1\)\s+64 x 128\s+2\s", table.stdout, re.M)
    whole = CliRunner().invoke(app, [*given, "--all"])
    assert "layers.1.mlp.down_proj" in whole.stdout
    report = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)
    assert {site["format"] for site in report["sites"] if site["fused"]} == {"int8"}
    bad = CliRunner().invoke(app, [*given[:3], "--format", "int9"])
    assert bad.exit_code == 2
    assert "the nearest is int8" in bad.stderr
