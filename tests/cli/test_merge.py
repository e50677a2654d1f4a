"""`qlora-compile merge`: a merged model that stock transformers loads, and its distance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qlora_compile.cli.app import app
from tests.toy_language_model import toy_llama, toy_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of an adapter of a packed model, with the settings of its run."""
    toy_llama().save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    get_peft_model(toy_llama(), config).save_pretrained(str(tmp_path / "run"))
    settings = {"model": str(tmp_path / "base"), "format": "int4:group_size=32", "data": "demo"}
    (tmp_path / "run" / "run.yaml").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text("brown foxes jump over lazy dogs. " * 20)
    return tmp_path / "run"


def test_a_run_is_merged_and_measured(run: Path) -> None:
    output, text = run.parent / "merged", run.parent / "text.txt"
    given = ["merge", "--adapter", str(run), "--output", str(output), "--data", str(text)]
    result = CliRunner().invoke(app, [*given, "--dtype", "float32", "--format", "int4"])
    assert result.exit_code == 0, result.output
    assert "distance from the trained model on 512 tokens" in result.stdout
    assert "of what the adapters changed" in result.stdout
    verify = ["verify", "--adapter", str(run), "--merged", str(output), "--data", str(text)]
    verify += ["--sequence-length", "32"]
    result = CliRunner().invoke(app, verify)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[-2:]] == ["adapter", "merged"]
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert merged.dtype == torch.float32
    merged.model.layers[0].mlp.up_proj.weight.data *= 2
    merged.save_pretrained(output)
    result = CliRunner().invoke(app, [*verify, "--json"])
    assert result.exit_code == 1, result.output
    stages = json.loads(result.stdout)["stages"]
    assert [stage["passes"] for stage in stages] == [True, False]
    assert stages[1]["ratio"] > 4
    assert AutoTokenizer.from_pretrained(output)("fox")["input_ids"]


def test_bad_input_in_one_line(run: Path) -> None:
    output = run.parent / "merged"
    given = ["merge", "--output", str(output), "--adapter"]
    for arguments, problem in (
        ([str(run.parent)], "it has no adapter_config.json"),
        ([str(run), "--dtype", "int8"], "--dtype='int8' is not an option"),
        ([str(run), "--format", "int3"], "--format 'int3' is unknown"),
    ):
        result = CliRunner().invoke(app, [*given, *arguments])
        assert result.exit_code == 2, result.output
        assert problem in result.stderr
    assert not output.exists()
