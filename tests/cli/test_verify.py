"""`qlora-compile verify`: a table or JSON, and an exit code that tells right from wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qlora_compile.capture import backend, pipeline
from qlora_compile.cli.app import app
from qlora_compile.hf import loading
from tests.toy_language_model import toy_llama, toy_tokenizer
from tests.verify.test_check import one_per_cent


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model, a text, and nothing compiled."""
    monkeypatch.setattr(backend, "compile_inner", lambda graph, inputs, *_: graph.forward)
    toy_llama().save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} brown foxes jump over lazy dogs. " * 9 for n in range(9)))
    given = ["verify", "--model", str(tmp_path), "--data", str(text), "--rank", "4"]
    return [*given, "--sequence-length", "32", "--tune", "model"]


def test_a_right_model_is_verified_on_real_text(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "LlamaDecoderLayer  real" in result.stdout
    assert "1 graphs verified, 14 of 15 linears fused" in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--json", "--dropout", "0.1"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["verified"] is True
    inputs = {each["inputs"] for each in told["certificates"][0]["comparisons"]}
    assert {"real", "random", "random, dropped out"} <= inputs


def test_a_mismatch_exits_with_1_and_bad_input_with_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(app, [*arguments, "--sequence-length", "4000"])
    assert result.exit_code == 2
    assert "error: " in result.stderr

    def planted(graph_module: Any, context: Any) -> int:
        one_per_cent(graph_module)
        return 1

    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES, planted))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    # 16-bit products, where the machine has them, hide it until all is float32.
    inputs = "real" if loading.compute_dtype() == torch.float32 else "random, in float32"
    told = f"mismatch in LlamaDecoderLayer: output 0 (inputs: {inputs}) is off by"
    assert told in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["verified"] is False
    assert len(told["mismatches"]) == 1
