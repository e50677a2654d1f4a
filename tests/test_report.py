"""The report lists every Linear once, as text and data; quantising holds at most one layer
twice."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import qlora_compile
from bench.agreement import distance, training_step
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.report import Site
from tests.capture.test_regions import Tower
from tests.test_equality import FLOAT32_TOLERANCE, as_rewritten, lora
from tests.toy_models import toy

__all__ = ["as_rewritten"]


def test_every_linear_appears_once_with_what_was_done() -> None:
    config = lora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = qlora_compile.optimize(toy(), config, quantize="nf4")
    report = qlora_compile.explain(model)
    names = [site.name.removeprefix("base_model.model.") for site in report.sites]
    plain = [name for name, module in toy().named_modules() if isinstance(module, nn.Linear)]
    assert names == plain
    for site in report.sites:
        if site.name.endswith("lm_head"):
            assert not site.fused
            assert site.reason == "it is trained in full (modules_to_save)"
            continue
        assert site.fused
        assert (site.format, site.variant, site.reason) == ("nf4", "dense", None)
        assert site.rank == (4 if site.name.endswith(("q_proj", "v_proj")) else 0)
    up_proj = next(site for site in report.sites if site.name.endswith("up_proj"))
    assert (up_proj.n, up_proj.k) == (128, 64)
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["fused"] == report.fused == 14
    text = str(report)
    assert all(site.name in text for site in report.sites)
    assert "14 of 15 linears fused" in text


def test_what_is_trained_in_full_is_listed_and_not_quantised() -> None:
    config = lora(target_modules=["q_proj"], modules_to_save=["mlp"])
    report = qlora_compile.explain(qlora_compile.optimize(toy(), config, quantize="nf4"))
    assert len(report.sites) == 15
    reasons = {site.name: site.reason for site in report.sites if ".mlp." in site.name}
    assert len(reasons) == 6
    assert set(reasons.values()) == {"it is trained in full (modules_to_save)"}


@pytest.mark.parametrize(
    ("options", "tied", "head", "embedding"),
    [
        ({"trainable_token_indices": [3, 5]}, False, "output head", "Embedding: rows of its"),
        ({"trainable_token_indices": [3, 5]}, True, "rows of its weight", "Embedding: rows of its"),
        ({"modules_to_save": ["embed_tokens"]}, False, "output head", "Embedding: it is trained"),
        ({"modules_to_save": ["lm_head"]}, False, "trained in full", None),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True, "tied to", "Embedding: it is not a"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False, "output head", "Embedding: it is"),
    ],
)
@pytest.mark.usefixtures("as_rewritten")
def test_what_peft_trains_beside_linears_is_equal_and_named(
    options: dict[str, Any], tied: bool, head: str, embedding: str | None
) -> None:
    steps = []
    ids = torch.tensor([[3, 5, 9, 11, 3, 7], [5, 4, 8, 3, 6, 10]])
    for optimized in (False, True):
        torch.manual_seed(1)
        settings: dict[str, Any] = {"target_modules": ["q_proj"]} | options
        config = lora(**settings)
        model: Any = get_peft_model(toy(tie_word_embeddings=tied), config)
        model = qlora_compile.optimize(model) if optimized else model
        steps.append(training_step(model, ids))
    assert steps[0].keys() == steps[1].keys()
    assert max(distance(steps[1], steps[0]).values()) < FLOAT32_TOLERANCE
    report = qlora_compile.explain(model)
    assert [site.name for site in report.sites if not site.fused] == ["base_model.model.lm_head"]
    assert head in (report.sites[-1].reason or "")
    if embedding is None:
        assert report.others == {}
        return
    ((name, reason),) = report.others.items()
    assert name.endswith("embed_tokens")
    assert reason.startswith(embedding)
    assert f"{name} left to PEFT: {reason}" in str(report)


def test_tied_heads_are_named() -> None:
    model = qlora_compile.optimize(toy(tie_word_embeddings=True), lora(), quantize="int8")
    head = qlora_compile.explain(model).sites[-1]
    assert head.name.endswith("lm_head")
    assert "tied to" in (head.reason or "")
    assert head.format == "float32"


def test_explaining_leaves_the_model_and_the_random_state_alone() -> None:
    model = qlora_compile.optimize(toy(), lora(0.5), quantize="nf4").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    qlora_compile.explain(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("as_rewritten")
def test_a_module_without_inputs_of_its_own_says_what_has_not_run() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model = qlora_compile.optimize(model, quantize="int8", block_size="row")
    report = qlora_compile.explain(model)
    assert {site.reason for site in report.sites} == {"its block has not run yet"}
    model(torch.randn(3, 8))
    assert qlora_compile.explain(model).fused == 2


def test_quantising_frees_each_weight_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    packed: list[weakref.ref[Any]] = []
    original = QuantizedLinear.from_linear.__func__

    def watching(cls: Any, linear: nn.Linear, *args: Any, **options: Any) -> QuantizedLinear:
        assert all(weight() is None for weight in packed)
        packed.append(weakref.ref(linear.weight))
        return original(cls, linear, *args, **options)

    monkeypatch.setattr(QuantizedLinear, "from_linear", classmethod(watching))
    qlora_compile.optimize(model, quantize="nf4")
    assert len(packed) == 14


@pytest.mark.usefixtures("as_rewritten")
def test_a_linear_outside_the_blocks_that_is_adapted_later_says_so() -> None:
    config = lora(target_modules=["up"])
    model = qlora_compile.optimize(Tower(), config, quantize="int8", tune="off").train()
    model.add_adapter("later", lora(target_modules=["up", "embed"]))
    model.base_model.set_adapter(["default", "later"])

    def embed() -> Site:
        model(torch.randn(3, 4)).sum().backward()
        sites = qlora_compile.explain(model).sites
        return next(site for site in sites if site.name.endswith("embed"))

    assert embed().reason == "it was adapted after `optimize`; optimize the model again"
    assert embed().rank == 4
    model = qlora_compile.optimize(model, tune="off")
    assert embed().fused


@pytest.mark.usefixtures("as_rewritten")
def test_explain_leaves_the_reasons_of_earlier_calls() -> None:
    model = qlora_compile.optimize(toy(), lora(), quantize="nf4", tune="off").train()
    first, _ = model.get_base_model().model.layers
    x, rotary = torch.randn(1, 5, 64), model.get_base_model().model.rotary_emb
    positions = rotary(x, torch.arange(5)[None])
    handle = first.mlp.register_full_backward_hook(lambda *_: None)
    first(x, position_embeddings=positions)
    handle.remove()
    for _ in range(2):
        # To see the second block, which has not run, it calls the model.
        sites = qlora_compile.explain(model).sites
        reasons = {site.reason for site in sites if ".layers.0." in site.name}
        assert len(reasons) == 1
        assert "backward hook" in str(reasons)
        assert all(site.fused for site in sites if ".layers.1." in site.name)
