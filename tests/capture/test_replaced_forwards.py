"""Forwards on a module's instance run as in stock PEFT, whoever put them there, where and when."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import qlora_compile
from qlora_compile.capture.regions import region_of
from qlora_compile.errors import LogitsFreeLossError, OffloadedWeightError
from qlora_compile.hf.blocks import checkpoints
from tests.capture.test_hooks import Pair, block, checkpointed, first, instead
from tests.examples import LONG
from tests.test_equality import FLOAT32_TOLERANCE, as_rewritten, lora
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten"]

pytestmark = pytest.mark.usefixtures("as_rewritten")


def as_method(module: nn.Module) -> None:
    """Replace the forward as Liger and TRL do."""

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = type(self).forward(self, *args, **kwargs)
        return instead(y, 0.5 * first(y))

    module.forward = MethodType(halved, module)


def as_closure(module: nn.Module) -> None:
    """Replace the forward by a closure around it."""
    forward = module.forward

    def halved(*args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        return instead(y, 0.5 * first(y))

    module.forward = halved


def printing(module: nn.Module) -> None:
    forward = module.forward

    def prints(*args: Any, **kwargs: Any) -> Any:
        print(len(args))
        return forward(*args, **kwargs)

    module.forward = prints


Replace = Callable[[nn.Module], None]


def adapted() -> Any:
    torch.manual_seed(1)
    return get_peft_model(toy(), lora())


def pair(prepare: Callable[[Any], Any] = lambda model: model) -> Pair:
    """Return a stock PeftModel and the optimised one, both prepared before that."""
    models = [prepare(adapted()) for _ in range(2)]
    models[1] = qlora_compile.optimize(models[1], tune="off")
    return Pair(*(model.train() for model in models))


def replaced(replace: Replace, path: str, layers: tuple[int, ...] = (0, 1)) -> Any:
    def prepare(model: Any) -> Any:
        for layer in layers:
            replace(block(model, layer).get_submodule(path))
        return model

    return prepare


def test_forwards_outside_the_blocks_are_run() -> None:
    def prepare(model: Any) -> Any:
        for path in ("", "base_model.model", "base_model.model.model"):
            printing(model.get_submodule(path))
        as_method(model.base_model.model.lm_head)
        return model

    both = pair(prepare)
    both.assert_agree(tokens())
    assert not both.reasons(0) | both.reasons(1)


@pytest.mark.parametrize("replace", [as_method, as_closure][: 1 + LONG])
def test_forwards_that_dynamo_traces_are_compiled_once(replace: Replace) -> None:
    """One on the block itself and one inside it; a copy takes them along."""
    counters.clear()
    both = pair(lambda model: replaced(as_method, "mlp")(replaced(replace, "")(model)))
    both.assert_agree(tokens())
    assert not both.reasons(0) | both.reasons(1)
    assert counters["stats"]["unique_graphs"] == 1
    if replace is as_method:
        twin = copy.deepcopy(both.ours)
        Pair(both.stock, twin).assert_agree(tokens())
        assert region_of(block(twin, 1)) is not region_of(block(both.ours, 1))


def test_with_others_the_block_runs_as_stock_and_the_report_names_them() -> None:
    both = pair(lambda model: replaced(printing, "mlp", (1,))(replaced(printing, "", (0,))(model)))
    both.assert_agree(tokens())
    for layer, where in enumerate(("the block itself", "mlp")):
        (reason,) = both.reasons(layer)
        assert reason.endswith(f"the forward {__name__}.printing.<locals>.prints on {where}")


def test_a_replaced_block_that_checkpoints_runs_as_stock() -> None:
    both = pair(replaced(as_method, "", layers=(1,)))
    for model in both:
        checkpointed(model, "nonreentrant")
    both.assert_agree(tokens())
    assert not both.reasons(0)
    # transformers 5.17 checkpoints a block from outside, which then runs compiled.
    reasons = both.reasons(1)
    assert bool(reasons) == checkpoints(block(both.ours, 1))
    assert all("as_method.<locals>.halved on the block itself" in reason for reason in reasons)


def test_forwards_that_come_and_go_after_optimize() -> None:
    both, ids = pair(), tokens()
    both.assert_agree(ids)
    for replace, path in (
        (as_method, "self_attn.k_proj.lora_A.default"),
        (as_closure, "self_attn.q_proj"),
        (printing, "mlp"),
    ):
        for model in both:
            replace(block(model, 1).get_submodule(path))
        both.assert_agree(ids)
        assert not both.reasons(0)
        reasons = both.reasons(1)
        if replace is printing:
            assert reasons.pop().endswith(f"on {path}")
        elif replace is as_closure:
            assert not reasons
        for model in both:
            del block(model, 1).get_submodule(path).forward
    counters.clear()
    both.assert_agree(ids)
    assert not both.reasons(0) | both.reasons(1)
    assert not counters["stats"]["unique_graphs"]


def test_a_forward_put_on_a_block_after_optimize_is_run_and_reported() -> None:
    both, ids = pair(), tokens()
    both.assert_agree(ids)
    ours: Any = block(both.ours, 1)
    region = region_of(ours)
    for replace, named in ((as_method, True), (as_closure, False), (printing, False)):
        for model in both:
            replace(block(model, 1))
        both.assert_agree(ids)
        assert not both.reasons(0)
        reasons = both.reasons(1)
        assert bool(reasons) == named  # the others call the region
        if named:
            assert "as_method.<locals>.halved on the block itself has replaced" in reasons.pop()
        del block(both.stock, 1).forward
        ours.forward = region
        both.assert_agree(ids)
        assert not both.reasons(1)
    del ours.forward
    both.assert_agree(ids)
    assert "LlamaDecoderLayer.forward" in both.reasons(1).pop()
    qlora_compile.optimize(both.ours, tune="off")
    both.assert_agree(ids)
    assert not both.reasons(0) | both.reasons(1)


def dispatched(model: Any) -> Any:
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize(
    "when", ["before adapters", "before optimize", "after"][: 3 if LONG else 1]
)
def test_models_that_accelerate_has_dispatched(when: str) -> None:
    """The hooks stay, quantised Linears take theirs along, all layers share a graph."""
    counters.clear()
    models: list[Any] = []
    for optimized in (False, True):
        model = toy()
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and name != "lm_head":
                # Exact in NF4: both models have the same weights.
                linear.weight.data = 0.02 * linear.weight.data.sign()
        if when == "before adapters":
            dispatched(model)
        torch.manual_seed(1)
        model = get_peft_model(model, lora())
        if when == "before optimize":
            dispatched(model)
        if optimized:
            qlora_compile.optimize(model, quantize="nf4", double_quantize=False, tune="off")
        models.append(model.train())
    both, ids = Pair(*models), tokens()
    if when == "after":
        both.assert_agree(ids)
        for model in both:
            dispatched(model)
    both.assert_agree(ids)
    assert not both.reasons(0) | both.reasons(1)
    assert counters["stats"]["unique_graphs"] == 1 + (when == "after")
    hooked = ({n for n, m in model.named_modules() if hasattr(m, "_hf_hook")} for model in both)
    assert next(hooked) == next(hooked)
    for model in both:
        for layer in (0, 1):
            remove_hook_from_submodules(block(model, layer))
    both.assert_agree(ids)
    assert not both.reasons(0) | both.reasons(1)


@pytest.mark.parametrize("where", ["cpu", "disk"][: 1 + LONG])
def test_offloaded_weights(where: str, tmp_path: Path) -> None:
    """A model whose weights are offloaded between calls is refused; one whose weights are offloaded
    later runs as in stock."""

    def offloaded(model: Any) -> Any:
        if where == "cpu":
            return cpu_offload(model, torch.device("cpu"))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return disk_offload(model, str(folder), torch.device("cpu"))

    model = offloaded(toy())
    with pytest.raises(OffloadedWeightError, match=r"embed_tokens.weight.*remove_hook") as raised:
        qlora_compile.optimize(model, quantize="nf4")
    assert "offloads nothing" in str(raised.value)
    remove_hook_from_submodules(model)
    qlora_compile.optimize(model, quantize="nf4", tune="off")
    ids = tokens()
    expected = model(input_ids=ids, use_cache=False).logits
    offloaded(model)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    reasons = {site.reason for site in qlora_compile.explain(model).sites}
    assert any("accelerate.hooks.add_hook_to_module" in str(reason) for reason in reasons)


def test_weights_that_a_device_map_leaves_on_a_disk(tmp_path: Path) -> None:
    toy().save_pretrained(tmp_path / "model")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    options: Any = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    with pytest.raises(
        OffloadedWeightError, match=r"^model\.layers\.1\.\S+ is offloaded.*device_map"
    ):
        qlora_compile.optimize(model, lora(), quantize="nf4")


def test_what_a_forward_on_the_instance_reads_is_not_packed() -> None:
    """Neither a Linear with a replaced forward, nor one whose weight its parent's forward reads."""
    models = [toy(), toy()]
    for model in models:
        mlp: Any = model.model.layers[0].mlp

        def forward(x: torch.Tensor, mlp: Any = mlp) -> torch.Tensor:
            hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            return nn.functional.linear(hidden, mlp.down_proj.weight)

        mlp.forward = forward
        as_method(model.model.layers[1].mlp.up_proj)
    stock, ours = models
    qlora_compile.optimize(ours, quantize="nf4", tune="off")
    ids = tokens()
    actual = ours(input_ids=ids, use_cache=False).logits
    formats = {site.name: site.format for site in qlora_compile.explain(ours).sites}
    plain = [name for name, format in formats.items() if format != "nf4" and name != "lm_head"]
    assert plain == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    for name, module in ours.named_modules():
        if formats.get(name) == "nf4":
            stock.get_submodule(name).weight.data = module.dequantize()
    expected = stock(input_ids=ids, use_cache=False).logits
    assert (actual - expected).norm() < FLOAT32_TOLERANCE * expected.norm()


def test_logits_free_loss() -> None:
    """The outermost forward may be replaced, but not the head's, whose result is then unknown."""
    models: list[Any] = [toy(), toy()]
    for model in models:
        model.forward = MethodType(type(model).forward, model)
        printing(model)
    qlora_compile.optimize(models[1], logits_free_loss=True, tune="off")
    ids = tokens()
    stock, ours = (model.train()(input_ids=ids, labels=ids) for model in models)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert ours.logits is None
    head = toy()
    as_method(head.lm_head)
    with pytest.raises(LogitsFreeLossError, match=r"as_method\.<locals>\.halved"):
        qlora_compile.optimize(head, logits_free_loss=True)
