"""Merging in place says that weights stay packed; unmerging gives back the same bytes."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config

from qlora_compile.hf.merged_base import MergedStaysPackedWarning
from qlora_compile.saving_errors import UnmergePlaceError
from tests.hf.merging.test_merge import lora, untrained
from tests.hf.test_experts import lora as experts_lora
from tests.hf.test_experts import toy as experts_toy
from tests.toy_models import toy

IA3 = IA3Config(
    target_modules=["q_proj", "down_proj"],
    feedforward_modules=["down_proj"],
    init_ia3_weights=False,
)

CASES: dict[str, Any] = {
    "LoRA": lambda: untrained(toy(), lora()),
    "lora_bias": lambda: untrained(
        toy("Bert"), lora(lora_bias=True, target_modules=["query"]), "int4"
    ),
    "DoRA": lambda: untrained(toy(), lora(use_dora=True)),
    "IA3": lambda: untrained(toy(), IA3, "int8"),
    "experts": lambda: untrained(experts_toy("mixtral"), experts_lora("mixtral")),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the weights from before are kept in."""
    monkeypatch.setenv("QLORA_COMPILE_UNMERGE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.mark.filterwarnings("ignore::qlora_compile.hf.merged_base.MergedStaysPackedWarning")
def test_what_is_kept_in_a_folder_goes_when_it_is_given_back(folder: Path) -> None:
    model = untrained(toy(num_hidden_layers=1), lora())
    with pytest.raises(UnmergePlaceError, match="name a folder with space"):
        model.merge_adapter()
    folder.mkdir()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert len(list(folder.iterdir())) == 7
    models = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model]
    del model
    while models:
        models[-1].unmerge_adapter()
        for name, tensor in models.pop().state_dict().items():
            assert torch.equal(tensor, before[name]), name
    gc.collect()
    assert not list(folder.iterdir())


@pytest.mark.filterwarnings("ignore::qlora_compile.hf.merged_base.MergedStaysPackedWarning")
def test_with_nothing_kept_unmerging_rounds_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_COMPILE_UNMERGE", "nothing")
    model = untrained(toy(num_hidden_layers=1), lora())
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    before, codes = layer.dequantize(), layer.weight.clone()
    model.merge_adapter()
    merged = layer.dequantize()
    model.unmerge_adapter()
    assert not torch.equal(layer.weight, codes)
    assert (layer.dequantize() - before).norm() < 2 * (merged - before).norm()


@pytest.mark.parametrize("case", CASES)
def test_unmerging_gives_back_the_same_bytes(case: str) -> None:
    model = CASES[case]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(MergedStaysPackedWarning, match="stay packed"):
        model.merge_adapter()
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert changed
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_weight_that_was_loaded_since_is_not_given_back() -> None:
    model, other = untrained(toy(), lora()), untrained(toy(), lora())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergedStaysPackedWarning)
        model.merge_adapter()
    site = "base_model.model.model.layers.0.self_attn.q_proj.base_layer"
    packed = model.get_submodule(site)
    loaded = {name: plane.flip(0) for name, plane in other.get_submodule(site).state_dict().items()}
    loaded["packed_layout"] = packed.packed_layout
    loaded["nested_offset"] = packed.nested_offset
    packed.load_state_dict(loaded)
    expected = packed.dequantize()
    layer = model.get_submodule(site.removesuffix(".base_layer"))
    expected = expected - layer.get_delta_weight("default").detach()
    model.unmerge_adapter()
    # Packed anew, so rounded: nearer to the loaded weight without the adapter than half a step.
    assert float((packed.dequantize() - expected).norm() / expected.norm()) < 0.2
