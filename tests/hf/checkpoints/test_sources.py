"""Every source: directly read weights decode as by another library's decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_compile
from bench.coverage import kinds
from qlora_compile.checkpoint_errors import CheckpointError
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear
from tests.hf.checkpoints.written import KINDS, Kind, save_sharded, written
from tests.toy_models import toy

ALLOWED = 3e-7
"""Relative: a division in place of a product with the reciprocal, both rounded to float32."""


def assert_decodes_alike(ours: nn.Module, dense: nn.Module, kind: Kind) -> int:
    """Compare all packed weights, and return their number."""
    expected = dict(dense.named_parameters())
    count = 0
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            actual, weight = module.dequantize(), expected.pop(f"{name}.weight")
        elif isinstance(module, PackedExperts):
            actual, weight = module.parameter(), expected.pop(name.removesuffix("_packed"))
        else:
            continue
        count += 1
        assert module.format == kind.format
        assert module.origin == f"{kind.method} checkpoint"
        if kind.exact:
            assert torch.equal(actual, weight), name
        else:
            torch.testing.assert_close(actual, weight, rtol=ALLOWED, atol=0)
    rest = dict(ours.named_parameters())
    for name, weight in expected.items():
        assert torch.equal(rest[name], weight), name
    return count


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.merged])
def test_llama(tmp_path: Path, name: str) -> None:
    model = toy(intermediate_size=256, num_hidden_layers=1, attention_bias=True)
    dense = written(tmp_path, model, KINDS[name], excluded=("o_proj",))
    ours = qlora_compile.load(tmp_path, dtype=torch.float32)
    assert assert_decodes_alike(ours, dense, KINDS[name]) == 6
    assert type(ours.model.layers[0].self_attn.o_proj) is nn.Linear


def test_settings_of_modelopt_in_a_file_of_their_own(tmp_path: Path) -> None:
    dense = written(tmp_path, toy(num_hidden_layers=1), KINDS["modelopt, nvfp4"])
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    quantization = {"quant_algo": config.pop("quantization_config")["quant_algo"]}
    file.write_text(json.dumps(config))
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization}))
    ours = qlora_compile.load(tmp_path, dtype=torch.float32)
    assert assert_decodes_alike(ours, dense, KINDS["modelopt, nvfp4"]) == 7
    beside.write_text("{}")
    with pytest.raises(CheckpointError, match="quantization: the file cannot be read"):
        qlora_compile.load(tmp_path)


RESCALING = {"awq": "mlp.act.scales", "modelopt, nvfp4": "mlp.up_proj.pre_quant_scale"}
"""Tensors by which other libraries rescale activations; the latter is what NVFP4_AWQ adds."""


@pytest.mark.parametrize("name", RESCALING)
def test_a_model_that_rescales_activations_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path, toy(num_hidden_layers=1), KINDS[name])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = {n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    assert tensors.keys() == index["weight_map"].keys()
    added = f"model.layers.0.{RESCALING[name]}"
    save_sharded(tmp_path, tensors | {added: torch.ones(128)})
    with pytest.raises(CheckpointError, match=rf"{added}: it rescales activations.*unquantised"):
        qlora_compile.load(tmp_path, dtype=torch.float32)


MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def mixture(name: str) -> Any:
    return kinds.built(kinds.KINDS[name])


@pytest.mark.parametrize(
    ("name", "model"),
    [
        (name, "gpt_oss" if kind.merged else MIXTURES[i % 3])
        for i, (name, kind) in enumerate(KINDS.items())
    ],
)
def test_mixture(tmp_path: Path, name: str, model: str) -> None:
    dense = written(tmp_path, mixture(model), KINDS[name])
    ours = qlora_compile.load(tmp_path, dtype=torch.float32)
    experts = [each for each in ours.modules() if isinstance(each, PackedExperts)]
    assert len(experts) >= 2
    assert_decodes_alike(ours, dense, KINDS[name])


def test_experts_in_different_orders_of_columns(tmp_path: Path) -> None:
    """Their weights are stored as one, which has one order."""
    written(tmp_path, mixture("mixtral"), KINDS["gptq v2, act-order"])
    file = tmp_path / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    name = next(each for each in tensors if ".experts." in each and each.endswith(".g_idx"))
    save_file(tensors | {name: tensors[name].flip(0).contiguous()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="group_index is not that of the weight below"):
        qlora_compile.load(tmp_path, dtype=torch.float32)
