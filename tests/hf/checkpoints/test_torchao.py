"""Checkpoints of torchao's tensors, written by stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType
from transformers import TorchAoConfig

import qlora_compile
from qlora_compile.checkpoint_errors import CheckpointError
from qlora_compile.hf.checkpoints import torchao
from qlora_compile.modules.linear import QuantizedLinear
from tests.hf.checkpoints.written import saved_by_transformers
from tests.toy_models import toy

INT4: Any = getattr(torch, "int4")  # noqa: B009  torch's stubs lack it
CONFIGS = (
    Float8WeightOnlyConfig(),
    Int8WeightOnlyConfig(),
    IntxWeightOnlyConfig(INT4, PerGroup(32), MappingType.ASYMMETRIC),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda each: type(each).__name__)
def test_decodes_as_torchao(tmp_path: Path, config: Any) -> None:
    kept = ["model.layers.0.self_attn.o_proj", "lm_head"]
    config = TorchAoConfig(config, modules_to_not_convert=kept)
    stock = saved_by_transformers(tmp_path, toy(attention_bias=True), config)
    ours = qlora_compile.load(tmp_path, dtype=torch.float32)
    packed = {n: m for n, m in ours.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == 13
    for name, module in packed.items():
        weight = stock.get_submodule(name).weight.dequantize()
        assert torch.equal(module.dequantize(), weight), name
        assert module.origin == "torchao checkpoint"
    plain = ours.model.layers[0].self_attn.o_proj
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, stock.model.layers[0].self_attn.o_proj.weight)


def test_an_unknown_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by_transformers(tmp_path, toy(), TorchAoConfig(Float8WeightOnlyConfig()))
    monkeypatch.setattr(torchao, "TENSORS", {})
    with pytest.raises(CheckpointError, match="its class is Float8Tensor"):
        qlora_compile.load(tmp_path)
