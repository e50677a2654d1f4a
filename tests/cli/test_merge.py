"""`qlora-compile merge` and what `verify` says of the folders of a run: adapter, packed, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import qlora_compile
from qlora_compile.capture import backend
from qlora_compile.cli.app import app
from qlora_compile.hf.loading import compute_dtype
from tests.toy_language_model import toy_llama, toy_tokenizer

STAGES = ("adapter in stock PEFT", "adapter", "packed", "merged")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an adapter of a packed model, with the settings of its run; none compiles."""
    monkeypatch.setattr(backend, "compile_inner", lambda graph, inputs, *_: graph.forward)
    toy_llama().save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    get_peft_model(toy_llama(), config).save_pretrained(str(tmp_path / "run"))
    settings = {"model": str(tmp_path / "base"), "format": "int4:group_size=32", "data": "demo"}
    (tmp_path / "run" / "run.yaml").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text("brown foxes jump over lazy dogs. " * 20)
    return tmp_path / "run"


def merged(run: Path, *options: str) -> Path:
    output = run.parent / "merged"
    given = ["merge", "--adapter", str(run), "--output", str(output), *options]
    result = CliRunner().invoke(app, [*given, "--data", str(run.parent / "text.txt")])
    assert result.exit_code == 0, result.output
    assert "distance from the trained model on 512 tokens" in result.stdout
    return output


def packed(run: Path, format: str, **options: Any) -> Path:
    """The run's base in a packed folder: quantised from the dtype in which the run has it, which
    depends on the machine."""
    folder = run.parent / format
    model = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=compute_dtype())
    qlora_compile.save(qlora_compile.optimize(model, quantize=format, **options), folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def verified(run: Path, *folders: Any, code: int = 0) -> dict[str, Any]:
    """The stages that `verify` shows of folders, by name."""
    given = ["verify", *map(str, folders), "--data", str(run.parent / "text.txt")]
    result = CliRunner().invoke(app, [*given, "--sequence-length", "32", "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    return {stage["name"]: stage for stage in json.loads(result.stdout)["stages"]}


def test_a_run_is_merged_and_measured(run: Path) -> None:
    output = merged(run, "--dtype", "float32", "--format", "int4")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(output)("fox")["input_ids"]
    folder = packed(run, "int4", group_size=32)
    given = ["verify", "--adapter", str(run), "--packed", str(folder), "--merged", str(output)]
    text = ["--data", str(run.parent / "text.txt"), "--sequence-length", "32"]
    result = CliRunner().invoke(app, [*given, *text])
    assert result.exit_code == 0, result.output
    rows = result.stdout.splitlines()[-4:]
    assert [" ".join(row.split()[:-4]) for row in rows] == list(STAGES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merged_folder_alone_tells_where_it_comes_from(dtype: str, run: Path) -> None:
    output = merged(run, "--dtype", dtype)
    stages = verified(run, "--merged", output)
    assert list(stages) == ["adapter in stock PEFT", "adapter", "merged"]
    model = AutoModelForCausalLM.from_pretrained(output)
    model.model.layers[0].mlp.up_proj.weight.data *= 2
    model.save_pretrained(output)
    stages = verified(run, "--merged", output, code=1)
    assert [stage["passes"] for stage in stages.values()] == [True, True, False]
    assert stages["merged"]["ratio"] > 4
    # Of a merged model whose origin is unknown, the error says what to pass.
    origin = output / "merged_from.json"
    run.rename(run.parent / "elsewhere")
    for content, problem in (
        (origin.read_text(), "the adapter is no longer in"),
        ("[]", "merged_from.json cannot be read"),
        (None, "it has no merged_from.json"),
    ):
        origin.unlink()
        if content is not None:
            origin.write_text(content)
        result = CliRunner().invoke(app, ["verify", "--merged", str(output)])
        assert result.exit_code == 2
        assert problem in result.stderr
        assert "pass --adapter" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_packed_folders_are_compared_with_what_was_trained(run: Path) -> None:
    right, other = packed(run, "int4", group_size=32), packed(run, "nf4")
    assert list(verified(run, "--packed", right)) == ["packed"]
    assert list(verified(run, "--adapter", run, "--packed", right)) == list(STAGES[:3])
    stages = verified(run, "--adapter", run, "--packed", other, code=1)
    assert [stage["passes"] for stage in stages.values()] == [True, True, False]


def test_an_adapter_that_peft_reads_in_another_way_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_compile.verify import stages

    def swapped(model: Any, folder: Path) -> Any:
        model = with_adapter(model, folder)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.data = parameter.data.flip(0)
        return model

    with_adapter = stages.with_adapter
    monkeypatch.setattr(stages, "with_adapter", swapped)
    found = verified(run, "--adapter", run, code=1)
    assert not found["adapter in stock PEFT"]["passes"]


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
