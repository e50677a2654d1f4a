"""Guards: few checks are repeated in every call, and whatever changes a block is still noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import qlora_compile
from qlora_compile.capture import region_kind
from qlora_compile.capture.guards import kept_guards
from qlora_compile.hf.own_graphs import in_own_graph
from qlora_compile.modules.packed import PackedModule
from tests.test_equality import FLOAT32_TOLERANCE, as_rewritten, lora, without_inductor
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten", "without_inductor"]

FAR = 1e-3
"""Between the effect of a change and that of another order of sums, relative to a tensor's norm."""

SKIPPED_BY_DYNAMO = "EMPTY_NN_MODULE_HOOKS_DICT"


def _identity(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return q, k


def _mean(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return q.transpose(1, 2), None


def _base_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Give a base class the forward that the adapted layers inherit from a farther one."""
    bases = type(model.get_base_model().model.layers[0].mlp.up_proj).__mro__
    forward: Any = next(vars(base)["forward"] for base in bases if "forward" in vars(base))
    assert "forward" not in vars(bases[1])
    patch.setattr(bases[1], "forward", lambda *args: 0.5 * forward(*args), raising=False)


def _norm(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.get_base_model().model.layers[0].input_layernorm.variance_epsilon = 0.5


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "an attribute of a module": _norm,
    "a function of a model's file": lambda model, patch: patch.setattr(
        modeling_llama, "apply_rotary_pos_emb", _identity
    ),
    "a function of torch.nn.functional": lambda model, patch: patch.setattr(
        nn.functional, "silu", nn.functional.relu
    ),
    "a base class of an adapted layer": _base_class,
    "the attention that is registered": lambda model, patch: patch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", _mean
    ),
}


@pytest.mark.usefixtures("without_inductor")
def test_few_guards_are_kept_and_changes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, bool]] = []

    def noting(module: nn.Module, entries: Any) -> list[bool]:
        kept = kept_guards(module, entries)
        seen[:] = zip(entries, kept, strict=True)
        return kept

    monkeypatch.setattr(region_kind, "kept_guards", noting)
    model: Any = qlora_compile.optimize(toy(num_hidden_layers=1), lora(), quantize="nf4").eval()
    ids = tokens()

    def logits(stance: Any) -> Tensor:
        with torch.no_grad(), torch.compiler.set_stance(stance):
            return model(input_ids=ids, use_cache=False).logits

    before = logits("default")
    kept = [entry for entry, is_kept in seen if is_kept]
    checked = [entry for entry, _ in seen if entry.guard_type != SKIPPED_BY_DYNAMO]
    repeated = [entry for entry in kept if entry.guard_type != SKIPPED_BY_DYNAMO]
    assert len(repeated) < 0.7 * len(checked)
    assert in_own_graph in [each.value for each in checked]
    assert in_own_graph not in [each.value for each in kept]
    layer = model.get_base_model().model.layers[0]
    packed = [module for module in layer.modules() if isinstance(module, PackedModule)]
    sides = [(*module.tensors[1:], module.packed_layout) for module in packed]
    planes = {id(plane) for side in sides for plane in side}
    parameters = {id(p) for p in layer.parameters()} - planes
    assert parameters <= {id(each.value) for each in kept}
    assert planes.isdisjoint(id(each.value) for each in kept)
    for name, change in CHANGES.items():
        seen.clear()
        change(model, monkeypatch)
        after = logits("default")
        assert seen, f"{name} was not noticed"
        assert (after - before).norm() > 2 * FLOAT32_TOLERANCE * before.norm()
        assert (after - logits("force_eager")).norm() < FLOAT32_TOLERANCE * after.norm()
        before = after


class _Tenth(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / 10


class _Third(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return input / 3


def _class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _dictionary(module: nn.Module, **changed: Any) -> dict[str, Any]:
    """Return the earlier dictionary, which lives on."""
    earlier = module.__dict__
    module.__dict__ = earlier | changed
    return earlier


def _rank(module: Any, rank: int) -> None:
    for factor, other in ((module.lora_A.default, -1), (module.lora_B.default, 0)):
        shape = [rank, rank]
        shape[other] = factor.weight.shape[other]
        factor.weight.data = torch.full(shape, 0.05)


def _weights(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((64,), value))


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "a parameter begins to train": lambda x: x.input_layernorm.weight.requires_grad_(),
    "a factor stops to train": lambda x: x.mlp.up_proj.lora_A.default.weight.requires_grad_(False),
    "a parameter's data of another dtype": lambda x: setattr(
        x.post_attention_layernorm.weight, "data", torch.full((64,), 1.5).bfloat16()
    ),
    "factors' data of another rank": lambda x: _rank(x.mlp.down_proj, 6),
    "Module.to": lambda x: x.self_attn.v_proj.double(),
    "another parameter": lambda x: setattr(x.input_layernorm, "weight", _weights(1.3)),
    "another parameter in the dictionary": lambda x: x.input_layernorm._parameters.update(
        weight=_weights(0.8)
    ),
    "another module": lambda x: setattr(x.mlp, "act_fn", nn.ReLU()),
    "a number": lambda x: setattr(x.input_layernorm, "variance_epsilon", 0.5),
    "a number in another dictionary": lambda x: _dictionary(
        x.post_attention_layernorm, variance_epsilon=0.5
    ),
    "another class": lambda x: _class(x.input_layernorm, _Tenth),
    "another class of a module without tensors": lambda x: _class(x.mlp.act_fn, _Third),
    "another weight in a Linear": lambda x: x.self_attn.o_proj.base_layer.requantize(
        torch.ones(64, 64)
    ),
    "a scaling": lambda x: x.mlp.gate_proj.set_scale("default", 5.0),
    "no adapters": lambda x: x.mlp.gate_proj.enable_adapters(False),
    "merged adapters": lambda x: x.mlp.up_proj.merge(),
    "a hook": lambda x: x.mlp.act_fn.register_forward_hook(lambda *args: args[-1] * 3),
    "its removal": lambda x: x.mlp.act_fn._forward_hooks.clear(),
}


@pytest.mark.usefixtures("as_rewritten")
def test_changes_in_one_of_several_layers_are_noticed() -> None:
    """Also where torch is set to skip checks of modules while their dictionaries stay the same."""
    model: Any = qlora_compile.optimize(toy(num_hidden_layers=3), lora(), quantize="nf4").train()
    layer = model.get_base_model().model.layers[1]
    ids = tokens()

    def step(stance: Any = "default") -> dict[str, Tensor]:
        model.zero_grad()
        with torch.compiler.set_stance(stance):
            output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        # Module.to casts gradients in place.
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": output.logits.detach(), **gradients}

    def kinds(tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {name: (each.dtype, each.shape) for name, each in tensors.items()}

    def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return kinds(a) != kinds(b) or any((a[n] - b[n]).norm() > FAR * b[n].norm() for n in a)

    kept = []
    with config.patch(use_recursive_dict_tags_for_guards=True):
        step()
        before = step()
        for name, change in IN_PLACE.items():
            kept.append(change(layer))
            after, expected = step(), step("force_eager")
            assert not differ(after, expected), f"{name} was not noticed"
            assert differ(after, before), f"{name} changes nothing"
            before = step()
