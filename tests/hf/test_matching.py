"""Names and patterns of a LoraConfig match what they match in stock PEFT."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import get_peft_model

import qlora_compile
from tests.examples import examples
from tests.test_equality import lora
from tests.toy_models import toy

NAMES = (
    *("q_proj", "down_proj", "mlp.down_proj", "model.layers.1.mlp.down_proj", "1.mlp", "mlp"),
    *("proj", "lm_head", "embed_tokens", "input_layernorm", "qproj", "layers.7.self_attn.q_proj"),
)
PATTERNS = (r".*\.q_proj", r".*layers\.1\..*(up|down)_proj", r".*\.query", r".*head", "all-linear")

lists = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)
rules = lists | st.sampled_from(PATTERNS)
configs = st.fixed_dictionaries(
    {"target_modules": rules},
    optional={
        "modules_to_save": lists,
        "exclude_modules": lists | st.sampled_from(PATTERNS[:-1]),
        "layers_to_transform": st.sampled_from((0, [1], [0, 1], [7])),
        "rank_pattern": st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), max_size=2),
    },
)


def trained(model: Any) -> dict[str, torch.Size]:
    return {n: p.shape for n, p in model.named_parameters() if p.requires_grad}


@settings(max_examples=examples(48), deadline=None)
@given(configs)
@example({"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["mlp.down_proj"]})
@example({"target_modules": ["q_proj", "qproj"]})
@example({"target_modules": ["q_proj"], "modules_to_save": ["proj"]})
def test_a_config_trains_what_it_trains_in_stock_peft_or_changes_nothing(options: Any) -> None:
    expected = actual = error = None
    with contextlib.suppress(TypeError, ValueError):
        expected = trained(get_peft_model(toy(), lora(**options)))
    model = toy()
    modules = {name: type(module) for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        actual = trained(qlora_compile.optimize(model, lora(**options), quantize="nf4", tune="off"))
    except (TypeError, ValueError) as raised:
        error = raised
    assert actual == expected, error
    if error is not None:
        assert {name: type(module) for name, module in model.named_modules()} == modules
        state = model.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], value) for name, value in before.items())
