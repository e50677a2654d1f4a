"""Guards: few checks are repeated in every call, and whatever changes a block is still noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import qlora_compile
from qlora_compile.capture import region_kind
from qlora_compile.capture.guards import kept_guards
from qlora_compile.modules.packed import PackedModule
from tests.test_equality import FLOAT32_TOLERANCE, lora, without_inductor
from tests.toy_models import tokens, toy

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")

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
