"""The command line takes a quantised checkpoint's folder, and keeps its weights as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_compile.cli.app import app
from tests.hf.checkpoints.written import KINDS, written
from tests.toy_models import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    written(folder, toy(num_hidden_layers=1), KINDS["fp8"])
    return folder


def test_explain_names_format_and_origin(folder: Path) -> None:
    options = ["--model", str(folder), "--tune", "model", "--json"]
    result = CliRunner().invoke(app, ["explain", *options])
    assert result.exit_code == 0, result.output
    sites = json.loads(result.stdout[result.stdout.index("{\n") :])["sites"]
    fused = [site for site in sites if site["fused"]]
    assert len(fused) == 7
    assert {(s["format"], s["origin"]) for s in fused} == {("fp8_e4m3", "fp8 checkpoint")}


@pytest.mark.parametrize("format", ["nf4", "int4:group_size=32"])
def test_another_format_is_refused(folder: Path, format: str) -> None:
    options = ["--model", str(folder), "--format", format]
    result = CliRunner().invoke(app, ["explain", *options])
    assert result.exit_code == 2
    assert f"is quantised already; leave out --format {format.partition(':')[0]}" in result.output


def test_a_damaged_shard_is_named_in_one_line(tmp_path: Path) -> None:
    written(tmp_path, toy(num_hidden_layers=1), KINDS["fp8"])
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    result = CliRunner().invoke(app, ["explain", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert f"{shard}: all tensors: the header cannot be read" in result.output.replace("\n", "")
