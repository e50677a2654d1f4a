"""What users do with a model beside training goes on working, and agrees with stock PEFT."""

from __future__ import annotations

import copy
import inspect
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

import qlora_compile
from qlora_compile.capture.regions import region_of
from qlora_compile.kernels.registry import FORMATS
from qlora_compile.modules.linear import QuantizedLinear
from tests.test_equality import as_rewritten, build, lora, step
from tests.toy_models import tokens, toy, with_bitsandbytes

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")

BASES = ("plain", "bnb-4bit", "nf4")


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_adapter_switches_agree_with_stock(base: str) -> None:
    stock, ours = build(base, torch.float32, 0.0, False)
    for model in (stock, ours):
        torch.manual_seed(2)
        model.add_adapter("other", lora(r=2))
    ids = tokens()
    seen = [logits(ours, ids)]
    assert_close(seen[0], logits(stock, ids))
    for model in (stock, ours):
        model.set_adapter("other")
    seen.append(logits(ours, ids))
    assert_close(seen[1], logits(stock, ids))
    with stock.disable_adapter(), ours.disable_adapter():
        seen.append(logits(ours, ids))
        assert_close(seen[2], logits(stock, ids))
    assert not any(torch.allclose(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("base", BASES)
def test_saved_adapters_are_stock_peft_files(base: str, tmp_path: Path) -> None:
    stock, ours = build(base, torch.float32, 0.0, False)
    for model, name in ((stock, "stock"), (ours, "ours")):
        model.save_pretrained(tmp_path / name)
    assert stock.state_dict().keys() == ours.state_dict().keys() or base == "nf4"
    fresh = toy()
    if base == "bnb-4bit":
        fresh = with_bitsandbytes(fresh, 4)
    elif base == "nf4":
        fresh = qlora_compile.optimize(fresh, quantize="nf4")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "ours")
    ids = tokens()
    assert_close(logits(loaded, ids), logits(stock, ids))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = [m.generate(input_ids=ids, **arguments) for m in (loaded, stock)]
    assert torch.equal(*written)
    files = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("stock", "ours")]
    assert files[0] == files[1]


@pytest.mark.parametrize("base", BASES)
def test_merge_and_unload_agrees_with_stock(base: str) -> None:
    # Stock packs the merged weight again where the base is bitsandbytes'.
    stock = build("bnb-4bit" if base == "nf4" else base, torch.float32, 0.0, False)[0]
    ours = build(base, torch.float32, 0.0, False)[1]
    ids = tokens()
    before = logits(ours, ids)
    ours.merge_adapter()
    stock.merge_adapter()
    assert_close(logits(ours, ids), logits(stock, ids))
    ours.unmerge_adapter()
    if base == "nf4":
        # Stock subtracts the adapters from the rounded weight, and rounds again.
        assert torch.equal(logits(ours, ids), before)
        ours.merge_adapter()
    else:
        stock.unmerge_adapter()
        assert_close(logits(ours, ids), logits(stock, ids))
    merged, expected = ours.merge_and_unload(), stock.merge_and_unload()
    assert_close(logits(merged, ids), logits(expected, ids))
    if base == "nf4":
        packed = merged.model.layers[0].mlp.up_proj
        assert isinstance(packed, QuantizedLinear)
        theirs = expected.model.layers[0].mlp.up_proj.weight.data
        assert torch.equal(packed.weight.data.flatten(), theirs.flatten())


@pytest.mark.parametrize("base", [each.name for each in FORMATS])
def test_merging_nothing_changes_no_code(base: str) -> None:
    """Packing what was decoded would round doubly quantised absmax once more."""
    ours = build(base, torch.float32, 0.0, False)[1]
    before = {name: plane.clone() for name, plane in ours.state_dict().items()}
    ours.unmerge_adapter()
    ours.add_adapter("elsewhere", lora(target_modules=["lm_head"]))
    ours.base_model.set_adapter("elsewhere")
    ours.merge_adapter()
    after = ours.state_dict()
    assert all(
        torch.equal(after[name], plane) for name, plane in before.items() if "head" not in name
    )


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_compiled_and_apart(how: str) -> None:
    model = build("nf4", torch.float32, 0.0, False)[1]
    ids = tokens()
    expected = step(model, ids)
    model.zero_grad()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    actual = step(twin, ids)
    for name in expected:
        assert_close(actual[name], expected[name])
    assert qlora_compile.explain(twin).fused == 14
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert_close(step(model, ids)["loss"], expected["loss"])


@pytest.mark.parametrize("base", [*BASES, "bnb-8bit", *(each.name for each in FORMATS[1::3])])
def test_generate_agrees_with_stock(base: str) -> None:
    stock, ours = build(base, torch.float32, 0.0, False)
    ids = tokens(2, 5)
    arguments = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    out = ours.eval().generate(**arguments)
    assert torch.equal(out, stock.eval().generate(**arguments))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_the_model_stays_what_it_was() -> None:
    model: Any = get_peft_model(toy(), lora())
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    classes = [type(module) for module in model.modules()]
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    block = model.base_model.model.model.layers[0]
    block_signature = inspect.signature(block.forward)
    optimized = qlora_compile.optimize(model)
    assert optimized is model
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    # An adapter layer is a subclass of what it was: compiled code reads its adapters by slots.
    for module, before in zip(model.modules(), classes, strict=True):
        assert issubclass(type(module), before)
        assert type(module) is before or before is LoraLinear
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights
    assert inspect.signature(block.forward) == block_signature
    assert region_of(block) is not None


def test_moving_to_another_dtype_keeps_the_planes() -> None:
    model: Any = qlora_compile.optimize(toy(), quantize="nf4")
    layer = model.model.layers[0].mlp.up_proj
    before = layer.dequantize(torch.float32)
    model.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert model.model.norm.weight.dtype == torch.bfloat16
