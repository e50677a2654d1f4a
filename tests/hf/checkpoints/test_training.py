"""Models of packed weights train as stock PEFT trains the dense model of the decoded weights, and
their graphs get certificates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import qlora_compile
from bench.coverage import kinds
from bench.coverage.compare import largest, trained
from tests.examples import LONG
from tests.hf.checkpoints.written import KINDS, written
from tests.hf.test_experts import TOLERANCE
from tests.hf.test_experts import lora as lora_of_experts
from tests.test_equality import lora, without_inductor
from tests.toy_models import tokens, toy

__all__ = ["without_inductor"]


def adapted(model: Any, config: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, copy.deepcopy(config)).train()


def assert_trains_as_dense(folder: Path, dense: Any, config: Any, inputs: Any) -> Any:
    ours = qlora_compile.load(folder, dtype=torch.float32)
    ours = qlora_compile.optimize(adapted(ours, config), tune="model", verify=True)
    actual, expected = trained(ours, inputs), trained(adapted(dense, config), inputs)
    assert actual[0].keys() == expected[0].keys()
    assert max(largest(actual, expected).values()) <= TOLERANCE
    report = qlora_compile.explain(ours)
    assert report.certificates
    assert not report.mismatches
    return report


LLAMAS = (
    *("fp8", "float-quantized, rows", "nvfp4-pack-quantized", "fp8, 4 bits"),
    *("gptq v2, act-order", "awq", "hqq"),
    *(["fp8, tensors", "gptq", "gptq, 8 bits, act-order"] if LONG else []),
    *(["pack-quantized", "int-quantized, rows"] if LONG else []),
)
"""One for each format; `make test-long` adds the other ways of sharing scales."""


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.usefixtures("without_inductor")
def test_llama(tmp_path: Path, name: str) -> None:
    dense = written(tmp_path, toy(intermediate_size=256, num_hidden_layers=1), KINDS[name])
    ids = tokens()
    inputs = {"input_ids": ids, "labels": ids}
    report = assert_trains_as_dense(tmp_path, dense, lora(), inputs)
    packed = {(s.format, s.origin) for s in report.sites if s.fused}
    assert packed == {(KINDS[name].format, f"{KINDS[name].method} checkpoint")}


MIXTURES = {
    "fp8": "mixtral",
    "float-quantized, rows": "qwen3_moe",
    "nvfp4-pack-quantized": "mixtral",
    "mxfp4": "gpt_oss",
    "gptq v2, act-order": "mixtral",
    **({"awq": "qwen3_moe"} if LONG else {}),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.usefixtures("without_inductor")
def test_mixture(tmp_path: Path, name: str) -> None:
    model = kinds.built(kinds.KINDS[MIXTURES[name]])
    dense = written(tmp_path, model, KINDS[name])
    config = lora_of_experts(MIXTURES[name])
    report = assert_trains_as_dense(tmp_path, dense, config, kinds.batch(dense))
    weights = [site for site in report.sites if site.experts]
    assert weights
    assert all(site.fused and site.rank == 4 for site in weights), str(report)
    assert {site.format for site in weights} == {KINDS[name].format}
