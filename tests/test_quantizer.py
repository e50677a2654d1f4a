"""Models packed while transformers loads them equal those packed afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

from qlora_compile import QloraCompileConfig, optimize, save
from qlora_compile.errors import (
    BlockSizeError,
    MetaDeviceError,
    OffloadedWeightError,
    UnknownFormatError,
)
from qlora_compile.kernels.formats.errors import FormatOptionError
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.modules.packed import PackedModule
from qlora_compile.saving_errors import DiskOffloadError, SkeletonError
from tests.hf.saving.test_save import assert_same
from tests.hf.test_conv1d import gpt2
from tests.hf.test_experts import toy as experts_toy
from tests.toy_models import tokens, toy

INT4 = {"group_size": 32, "zeros": "float", "refine": True}

CASES: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "shards": (lambda: toy(attention_bias=True), "nf4", {}, {}),
    "other dtype": (toy, "nf4", {"block_size": 32}, {"dtype": torch.bfloat16}),
    "device map": (toy, "int8", {"block_size": "row"}, {"device_map": "cpu"}),
    "tied": (lambda: toy("Gemma3", tie_word_embeddings=True), "nvfp4", {}, {}),
    "Conv1D": (gpt2, "int4", INT4, {}),
    "mixtral": (lambda: experts_toy("mixtral"), "fp4", {}, {"dtype": torch.bfloat16}),
    "gpt_oss": (lambda: experts_toy("gpt_oss"), "nf4", {"double_quantize": False}, {}),
    "deepseek_v3": (lambda: experts_toy("deepseek_v3"), "int4", INT4, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_packing_afterwards(case: str, tmp_path: Path) -> None:
    make, format, options, loading = CASES[case]
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = QloraCompileConfig(format, **options)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config, **loading)
    afterwards = type(model).from_pretrained(tmp_path, **loading)
    optimize(afterwards, quantize=format, **options)
    assert_same(loaded.state_dict(), afterwards.state_dict())
    assert any(isinstance(module, PackedModule) for module in loaded.modules())
    assert torch.isfinite(loaded(tokens()).logits).all()
    assert loaded.num_parameters() == model.num_parameters()


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


@pytest.mark.parametrize("stored", ["plain", "packed"])
def test_a_device_map_in_parts_loads_the_same_and_disk_is_refused(
    stored: str, tmp_path: Path
) -> None:
    model, config = toy(), QloraCompileConfig("int8")
    options: dict[str, Any] = {"quantization_config": config}
    if stored == "packed":
        if not hasattr(HfQuantizer, "update_attn_implementation"):
            pytest.skip("transformers before 5.18 does not open packed folders")
        optimize(model, quantize="int8")
        options = {}
    model.save_pretrained(tmp_path)
    parts: dict[str, Any] = {**dict.fromkeys(PARTS, "cpu"), "model.rotary_emb": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=parts, **options)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert_same(loaded.state_dict(), whole.state_dict())
    ids = tokens()
    assert torch.equal(loaded(ids).logits, whole(ids).logits)
    parts["model.layers.1"] = "disk"
    with pytest.raises(DiskOffloadError, match=r"model\.layers\.1 on disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=parts, **options)


def test_a_packed_weight_that_is_offloaded_runs_and_is_not_written(tmp_path: Path) -> None:
    """As where a `device_map` of GPUs puts it on the CPU."""
    toy().save_pretrained(tmp_path / "model")
    config = QloraCompileConfig("int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    ids = tokens()
    expected = model(ids).logits
    site = "model.layers.1.mlp.up_proj"
    cpu_offload(model.get_submodule(site), torch.device("cpu"))
    assert {p.device.type for p in model.get_submodule(site).parameters()} == {"meta"}
    assert torch.equal(model(ids).logits, expected)
    lora = LoraConfig(target_modules=["q_proj"])
    for act in (lambda: optimize(model, lora), lambda: save(model, tmp_path / "saved")):
        with pytest.raises(OffloadedWeightError, match=rf"^{site}.* is offloaded"):
            act()
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    remove_hook_from_submodules(model)
    torch.testing.assert_close(optimize(model, lora)(ids).logits, expected)


@pytest.mark.parametrize(
    ("device_map", "site"),
    [("meta", "the model"), ({"model": "cpu", "lm_head": "meta"}, "lm_head")],
)
def test_what_has_no_data_is_not_packed(device_map: Any, site: str, tmp_path: Path) -> None:
    toy().save_pretrained(tmp_path)
    with pytest.raises(MetaDeviceError, match=f"^{site} is on the meta device"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, quantization_config=QloraCompileConfig("int8")
        )


@pytest.mark.parametrize("stored", ["plain", "packed"])
def test_a_skeleton_is_filled_from_a_checkpoint(stored: str, tmp_path: Path) -> None:
    model = toy(dtype=torch.bfloat16)
    if stored == "packed":
        optimize(model, quantize="nf4")
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = type(model)(model.config).bfloat16()
    given = "nf4" if stored == "plain" else None
    lora = LoraConfig(target_modules=["q_proj"])
    adapted = optimize(skeleton, lora, quantize=given, checkpoint=tmp_path)
    assert adapted.get_base_model() is skeleton
    layer = skeleton.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "QuantizedLoraLinear"
    if stored == "plain":
        optimize(model, quantize="nf4")
    found = skeleton.state_dict()
    assert_same(
        {k: found[k.replace("q_proj.", "q_proj.base_layer.")] for k in model.state_dict()},
        model.state_dict(),
    )
    assert skeleton.save_pretrained.model is skeleton


def test_what_is_no_skeleton_is_refused(tmp_path: Path) -> None:
    for model in (toy(), torch.nn.Linear(2, 2)):
        with pytest.raises(SkeletonError, match="checkpoint= cannot fill this"):
            optimize(model, quantize="nf4", checkpoint=tmp_path)


def test_bad_options_are_errors() -> None:
    cases: tuple[tuple[Any, dict[str, Any]], ...] = (
        (UnknownFormatError, {"format": "nf3"}),
        (UnknownFormatError, {}),
        (BlockSizeError, {"format": "nf4", "block_size": 65}),
        (FormatOptionError, {"format": "mxfp4", "group_size": 16}),
    )
    for error, options in cases:
        with pytest.raises(error):
            QloraCompileConfig(**options)


def test_a_weight_that_cannot_be_packed_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = toy()
    weight: Tensor = model.model.layers[1].mlp.up_proj.weight
    weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="automatic conversion"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=QloraCompileConfig("int4")
        )
    assert "layers.1.mlp.up_proj: the weight holds 1 NaN" in caplog.text


def test_a_weight_that_the_folder_lacks_is_packed_as_initialised(tmp_path: Path) -> None:
    model = toy()
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QloraCompileConfig("int8")
    )
    layers = [layer.mlp.up_proj for layer in loaded.model.layers]
    assert [type(layer) for layer in layers] == [QuantizedLinear] * 2
    weight = layers[1].dequantize()
    assert 0 < weight.std() < 2 * model.config.initializer_range
    assert torch.isfinite(loaded(tokens()).logits).all()


def test_a_config_is_written_and_read() -> None:
    config = QloraCompileConfig("int4", group_size=128)
    again = QloraCompileConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert config.to_dict()["options"] == {"group_size": 128}
