"""Saved packed models are read by the libraries whose folders they are, and bit for bit by us."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

import qlora_compile
from qlora_compile.capture.regions import uninstall
from qlora_compile.checkpoint_errors import CheckpointError
from qlora_compile.errors import OptionError
from qlora_compile.hf.saving.folders.registry import FOLDERS
from qlora_compile.hf.saving.save import SavePacked
from qlora_compile.modules.packed import PackedModule
from qlora_compile.report import regions_of
from qlora_compile.saving_errors import (
    FolderFormatError,
    MergedWeightsError,
    NothingPackedError,
    PackedFolderVersionError,
    RivalWeightsError,
    SavedModelTypeError,
    SaveOptionError,
    ShardSizeError,
    UnfinishedSaveError,
)
from qlora_compile.sites import Inventory
from tests.hf.test_conv1d import gpt2
from tests.hf.test_experts import toy as experts_toy
from tests.toy_models import tokens, toy

NEEDS_HOOK = pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_attn_implementation"),
    reason="transformers before 5.18 has no hook by which a quantizer names its files",
)

HELD: dict[str, tuple[str, dict[str, Any], str]] = {
    "NF4": ("nf4", {}, "bitsandbytes"),
    "FP4": ("fp4", {"double_quantize": False}, "bitsandbytes"),
    "INT8 by row": ("int8", {"block_size": "row"}, "bitsandbytes"),
    "INT4": ("int4", {"group_size": 32}, "compressed-tensors"),
    "INT4 symmetric": ("int4", {"zeros": "none", "group_size": "row"}, "compressed-tensors"),
    "INT4 float zeros": ("int4", {"zeros": "float"}, "qlora_compile"),
    "INT8 in blocks": ("int8", {}, "qlora_compile"),
    "NVFP4": ("nvfp4", {}, "qlora_compile"),
}
"""Formats with options, and the folder that is chosen for them."""


def packed(held: str = "INT8 in blocks", model: Any = None) -> Any:
    model = toy(dtype=torch.bfloat16, attention_bias=True) if model is None else model
    return qlora_compile.optimize(model, quantize=HELD[held][0], **HELD[held][1])


def dense(model: Any) -> dict[str, Tensor]:
    """Return the decoded weights of our packed Linears."""
    modules = model.named_modules()
    return {name: m.dequantize() for name, m in modules if isinstance(m, PackedModule)}


def read(module: Any) -> Any:
    """Return the weight of a Linear, as the library that reads it decodes it."""
    kind = type(module)
    if kind is Linear4bit:
        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    if kind is Linear8bitLt:
        state = module.state
        scales = module.weight.SCB if state.SCB is None else state.SCB
        return (module.weight.data * (scales.unsqueeze(1) / 127)).to(torch.bfloat16)
    return module.weight


@pytest.mark.parametrize("held", [each for each in HELD if HELD[each][2] != "qlora_compile"])
def test_stock_transformers_reads_it(held: str, tmp_path: Path) -> None:
    model = packed(held)
    assert qlora_compile.save(model, tmp_path, max_shard_size="30KB") == HELD[held][2]
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert HELD[held][2] in (tmp_path / "README.md").read_text()
    options: dict[str, Any] = {}
    if HELD[held][2] == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    for name, weight in dense(model).items():
        assert torch.equal(read(loaded.get_submodule(name)), weight), name
    theirs = loaded.state_dict()
    plain = {k: v for k, v in model.state_dict().items() if v.dtype == torch.bfloat16}
    for name in plain.keys() - {f"{layer}.scales" for layer in dense(model)}:
        assert torch.equal(theirs[name], plain[name]), name


MODELS = {
    "tied": lambda: toy("Gemma3", tie_word_embeddings=True),
    "Conv1D": gpt2,
    "mixtral": lambda: experts_toy("mixtral"),
    "gpt_oss": lambda: experts_toy("gpt_oss"),
}


@NEEDS_HOOK
@pytest.mark.parametrize("kind", MODELS)
def test_ours_is_read_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = packed(model=MODELS[kind]())
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not list(tmp_path.glob("model*"))
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(loaded.state_dict(), model.state_dict())
    ids = tokens()
    assert torch.equal(plain(model)(ids).logits, loaded(ids).logits)
    direct = qlora_compile.load(tmp_path, dtype=model.dtype)
    assert_same(direct.state_dict(), model.state_dict())
    assert torch.equal(loaded(ids).logits, direct.eval()(ids).logits)
    loaded.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def plain(model: Any) -> Any:
    """Return an optimised model in evaluation, without its compiled regions: compiling takes
    seconds."""
    for region in regions_of(Inventory(model)).values():
        uninstall(region.module)
    return model.eval()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_without_us_transformers_finds_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed().save_pretrained(tmp_path)
    for registry in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(registry, "qlora_compile")
    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transformers_own_saving_is_refused(tmp_path: Path) -> None:
    config = qlora_compile.QloraCompileConfig("nf4")
    toy().save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    with pytest.raises(ValueError, match="not serializable"):
        type(loaded).save_pretrained(loaded, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert isinstance(loaded.save_pretrained, SavePacked)


@NEEDS_HOOK
def test_base_and_adapters_of_a_peft_model(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = qlora_compile.optimize(toy(), lora, quantize="uint8", group_size=32).eval()
    qlora_compile.save(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = tokens()
    assert torch.equal(loaded(ids).logits, plain(model)(ids).logits)
    model.merge_adapter()
    with pytest.raises(MergedWeightsError, match="unmerge_adapter"):
        qlora_compile.save(model, tmp_path / "merged")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    packed().save_pretrained(folder, max_shard_size="30KB")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with files_up_to(20_000), pytest.raises(UnfinishedSaveError, match="unchanged"):
        packed("INT4 float zeros").save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_errors_come_before_anything_is_written(tmp_path: Path) -> None:
    model, target = packed(), tmp_path / "new"
    for error, call in (
        (NothingPackedError, lambda: qlora_compile.save(toy(), target)),
        (SavedModelTypeError, lambda: qlora_compile.save(torch.nn.Linear(2, 2), target)),
        (FolderFormatError, lambda: qlora_compile.save(model, target, stored_as="bitsandbytes")),
        (OptionError, lambda: qlora_compile.save(model, target, stored_as="gguf")),
        (ShardSizeError, lambda: model.save_pretrained(target, max_shard_size="big")),
        (SaveOptionError, lambda: model.save_pretrained(target, variant="fp16")),
        (SaveOptionError, lambda: model.save_pretrained(target, state_dict={})),
    ):
        with pytest.raises(error):
            call()
        assert not target.exists()
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(RivalWeightsError, match=r"model\.safetensors"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@NEEDS_HOOK
def test_a_folder_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="the model has none there"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config["quantization_config"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (AutoModelForCausalLM.from_pretrained, qlora_compile.load):
        with pytest.raises(PackedFolderVersionError, match="version 2"):
            load(tmp_path)


def test_every_folder_is_tested() -> None:
    assert {kind.name for kind in FOLDERS} == {folder for _, _, folder in HELD.values()}
