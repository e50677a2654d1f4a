"""Merged models, read by stock transformers, compute the same as the trained ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor

import qlora_compile
from qlora_compile import optimize
from qlora_compile.hf.merging.write import write_merged
from qlora_compile.saving_errors import (
    BaseFolderError,
    DtypeError,
    MergedWeightsError,
    RivalWeightsError,
    UnknownAdapterError,
    UnmergeableError,
)
from tests.hf.saving.test_save import files, plain
from tests.hf.test_conv1d import gpt2
from tests.hf.test_experts import TOLERANCE, TYPES
from tests.hf.test_experts import lora as experts_lora
from tests.hf.test_experts import toy as experts_toy
from tests.toy_models import toy, with_bitsandbytes

IDS = torch.arange(3, 35).view(2, 16)


def lora(**options: Any) -> LoraConfig:
    chosen = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**(chosen | options))


def untrained(model: Any, config: Any, format: str | None = "nf4", **options: Any) -> Any:
    """Return the model packed, with adapters whose every trained parameter is moved a little."""
    model = model if format is None else plain(optimize(model, quantize=format, **options))
    model = get_peft_model(model, config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


CASES: dict[str, Any] = {
    "bias": lambda: untrained(toy(attention_bias=True), lora(use_rslora=True), "int4"),
    "lora_bias": lambda: untrained(toy("Bert"), lora(lora_bias=True, target_modules=["query"])),
    "DoRA": lambda: untrained(toy(), lora(use_dora=True)),
    "bitsandbytes": lambda: untrained(plain(optimize(with_bitsandbytes(toy(), 4))), lora(), None),
    "unpacked": lambda: untrained(toy(), lora(), None),
    "Conv1D": lambda: untrained(gpt2(), lora(target_modules=["c_attn", "c_proj", "wte"]), "int8"),
    "heads trained": lambda: untrained(toy(), lora(modules_to_save=["lm_head", "embed_tokens"])),
    "tied head adapted": lambda: untrained(tied(), lora(target_modules=["q_proj", "lm_head"])),
    "tied tokens": lambda: untrained(
        tied(), lora(target_modules=["q_proj"], trainable_token_indices=[5, 6])
    ),
    "tied": lambda: untrained(tied(), lora(target_modules=["q_proj"])),
    "llama4_text": lambda: untrained(experts_toy("llama4_text"), experts_lora("llama4_text")),
}


TIED = ("tied", "tied tokens", "lora_bias")
"""Those whose head and embeddings are still equal."""


def tied() -> Any:
    return toy("Gemma3", tie_word_embeddings=True)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_computes_the_same(case: str, tmp_path: Path) -> None:
    model = CASES[case]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen: Any = {"dtype": torch.float32, "weights": None, "max_shard_size": "90KB"}
    base = write_merged(model, tmp_path / "merged", **chosen).base
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 1
    loaded = type(base).from_pretrained(tmp_path / "merged")
    assert distance(logits(loaded), logits(model)) < TOLERANCE
    with model.disable_adapter():
        assert distance(logits(loaded), logits(model)) > 10 * TOLERANCE
    assert loaded.config.tie_word_embeddings == (case in TIED)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_adapters_of_experts_survive(name: str, tmp_path: Path) -> None:
    assert name in TYPES
    model = untrained(experts_toy(name), experts_lora(name))
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    merge_options: Any = {"dtype": torch.float32, "max_shard_size": "1GB"}
    write_merged(model, tmp_path / "base", weights={}, **merge_options)
    write_merged(model, tmp_path / "merged", weights=None, **merge_options)
    stock = type(model.get_base_model())
    base = stock.from_pretrained(tmp_path / "base")
    reloaded: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert distance(logits(reloaded), expected) < TOLERANCE
    assert distance(logits(reloaded.merge_and_unload()), expected) < TOLERANCE
    assert distance(logits(stock.from_pretrained(tmp_path / "merged")), expected) < TOLERANCE


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    model = untrained(toy(), lora())
    model.add_adapter("other", lora(r=2, target_modules=["q_proj"]))
    qlora_compile.merge(model, tmp_path, torch.float32, adapters={"default": 0.5, "other": 2.0})
    expected = model.base_model
    for layer in expected.modules():
        if hasattr(layer, "lora_A"):
            for name, weight in (("default", 0.5), ("other", 2.0)):
                if name in layer.scaling:
                    layer.scaling[name] *= weight
    model.base_model.set_adapter(["default", "other"])
    loaded = type(model.get_base_model()).from_pretrained(tmp_path)
    assert distance(logits(loaded), logits(model)) < TOLERANCE


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 2

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 120 for letter in text]}

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_the_distance_is_measured(tmp_path: Path) -> None:
    model = untrained(toy(dtype=torch.bfloat16), lora(init_lora_weights=True))
    merging: Any = {"tokenizer": Letters(), "texts": ["some text, " * 40], "format": "int4"}
    report = qlora_compile.merge(model, tmp_path / "merged", group_size=32, **merging)
    assert report.tokens == 384
    assert report.base is not None
    assert report.merged is not None
    assert report.repacked is not None
    assert report.repacking is not None
    # The loss is that of transformers, and what is rounded once is nearer than what is packed.
    sequences = torch.tensor(Letters()("some text, " * 40)["input_ids"])[:384].view(3, 128)
    with torch.no_grad():
        losses = [model(input_ids=ids[None], labels=ids[None]).loss for ids in sequences]
    assert report.trained_loss == pytest.approx(float(sum(losses)) / 3, rel=1e-3)
    assert 0 < report.merged.logits < report.repacked.logits
    assert report.merged.divergence < report.repacked.divergence
    assert report.repacking > 0
    assert "merged in bfloat16" in str(report)
    assert f"{report.repacking:.2f} of what the adapters changed" in str(report)
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_errors_leave_nothing_behind(tmp_path: Path) -> None:
    model, out = untrained(toy(), lora()), tmp_path / "new"
    merge = qlora_compile.merge
    for error, call in (
        (DtypeError, lambda: merge(model, out, torch.int8)),
        (UnknownAdapterError, lambda: merge(model, out, adapters="third")),
        (
            UnmergeableError,
            lambda: merge(untrained(toy(), lora(lora_bias=True)), out),
        ),
        (
            UnmergeableError,
            lambda: merge(untrained(toy(), lora(use_dora=True)), out, adapters={"default": 0.5}),
        ),
    ):
        with pytest.raises(error):
            call()
        assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "qlora_compile.safetensors.index.json").write_text("")
    with pytest.raises(RivalWeightsError):
        merge(model, out)
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(BaseFolderError):
        merge(model, tmp_path)
    model.merge_adapter()
    with pytest.raises(MergedWeightsError):
        merge(model, tmp_path / "another")


def test_adapters_beside_the_merged_model_stay(tmp_path: Path) -> None:
    """Each time: they may be the only copy of what was merged."""
    model = untrained(toy(num_hidden_layers=1), lora(target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    before = files(tmp_path)
    for _ in range(2):
        qlora_compile.merge(model, tmp_path, torch.float32)
        assert (tmp_path / "model.safetensors").is_file()
        assert before.items() <= files(tmp_path).items()


def test_an_adapter_that_reaches_some_of_the_experts_wrappers(tmp_path: Path) -> None:
    """PEFT's own merge skips an adapter where there is none of it; so does ours."""
    model = untrained(experts_toy("mixtral"), experts_lora("mixtral"), None)
    model.add_adapter("other", lora(target_modules=["q_proj"]))
    model.set_adapter("other")
    qlora_compile.merge(model, tmp_path, torch.float32)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    loaded = type(model.get_base_model()).from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == merged.keys()
    for name, tensor in merged.items():
        assert distance(loaded[name], tensor) < TOLERANCE, name


@pytest.mark.parametrize("weights", [{"default": 1.0, "other": 1.0}, {"other": 0.3}])
def test_an_adapter_without_the_tokens_of_another(
    tmp_path: Path, weights: dict[str, float]
) -> None:
    model = untrained(
        toy(num_hidden_layers=1),
        lora(target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        None,
    )
    model.add_adapter("other", lora(target_modules=["v_proj"]))
    model.set_adapter("other")
    qlora_compile.merge(model, tmp_path, torch.float32, adapters=weights)
    stock = copy.deepcopy(model)
    for layer in stock.modules():
        if isinstance(layer, LoraLayer) and "other" in layer.scaling:
            layer.scaling["other"] *= weights["other"]
    for layer in stock.modules():
        if isinstance(layer, LoraLayer):
            layer.merge(adapter_names=[name for name in weights if name in layer.lora_A])
        elif isinstance(layer, TrainableTokensLayer):
            layer.merge(adapter_names=[name for name in weights if name in layer.token_indices])
    merged = stock.unload().state_dict()
    loaded = type(model.get_base_model()).from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == merged.keys()
    for name, tensor in merged.items():
        assert distance(loaded[name], tensor) < TOLERANCE, name
