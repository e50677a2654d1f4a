"""Checkpoints of bitsandbytes, written by stock transformers and read without bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig

import qlora_compile
from qlora_compile.modules.linear import QuantizedLinear
from tests.hf.checkpoints.written import saved_by_transformers
from tests.toy_models import toy

SETTINGS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "4 bits double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "8 bits": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "o_proj"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_planes_equal_those_that_are_adopted_from_bitsandbytes(tmp_path: Path, name: str) -> None:
    config = BitsAndBytesConfig(**SETTINGS[name])
    model = toy(tie_word_embeddings=True)
    stock = saved_by_transformers(tmp_path, model, config, max_shard_size="30KB")
    direct = qlora_compile.load(tmp_path, dtype=torch.float32)
    adopted = dict(qlora_compile.optimize(stock, tune="model").named_modules())
    packed = {n: m for n, m in direct.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == (12 if name == "8 bits" else 14)
    for path, module in packed.items():
        expected = adopted[path].packed
        assert module.packed.layout == expected.layout
        for plane, tensor in expected.planes.items():
            own = module.packed.planes[plane]
            assert torch.equal(own.reshape(-1), tensor.reshape(-1)), (path, plane)
        assert module.origin == "bitsandbytes checkpoint"
    rest = dict(direct.named_parameters())
    for path, parameter in stock.named_parameters():
        if parameter.is_floating_point():
            assert torch.equal(rest[path], parameter), path
    assert direct.lm_head.weight is direct.model.embed_tokens.weight
    assert direct.name_or_path == str(tmp_path)
    assert not hasattr(direct.config, "quantization_config")
