"""Every method in PEFT's registry over packed weights: as in stock PEFT, or refused before anything
was changed."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import qlora_compile
from qlora_compile.adapter_errors import AdapterMethodError
from qlora_compile.errors import AdapterConfigError
from qlora_compile.hf.methods import WORKING
from qlora_compile.modules.linear import QuantizedLinear
from tests.test_equality import without_inductor
from tests.toy_models import toy, with_bitsandbytes

__all__ = ["without_inductor"]

METHODS = tuple(PEFT_TYPE_TO_TUNER_MAPPING)
TARGETS = ["q_proj", "down_proj"]
OPTIONS: dict[str, Any] = {
    "target_modules": TARGETS,
    "task_type": "CAUSAL_LM",
    "total_step": 10,
    "feedforward_modules": ["down_proj"],
    "vector_length": 32,
    "num_virtual_tokens": 2,
    "block_size": 32,
}
"""What every config is given, so far as it has the field."""

OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": [3, 5]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "q_proj"]},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "target_modules": None},
    "CPT": {
        "cpt_token_ids": [3, 4, 5, 6],
        "cpt_mask": [1, 1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 3, 4],
    },
}


def config_of(method: str, **options: Any) -> Any:
    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    fields = {field.name for field in dataclasses.fields(made)}
    given = OPTIONS | OWN_OPTIONS.get(method, {}) | options
    return made(**{name: value for name, value in given.items() if name in fields})


@pytest.fixture
def eager() -> Iterator[None]:
    """Blocks run as their classes' forwards, uncompiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


def small() -> Any:
    return toy(num_hidden_layers=1)


def packed() -> Any:
    return qlora_compile.optimize(small(), quantize="int8", tune="off")


@pytest.fixture(scope="module")
def decoded() -> Any:
    """The toy with the weights that packing leaves of it."""
    model = small()
    with torch.no_grad():
        for name, module in packed().named_modules():
            if isinstance(module, QuantizedLinear):
                model.get_submodule(name).weight.copy_(module.dequantize())
    return model


def attach(model: Any, config: PeftConfig) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, copy.deepcopy(config))


def adapted(model: Any, config: PeftConfig) -> Any:
    """Return stock PEFT's model, its adapters no longer as they begin."""
    model = attach(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    return model


def take(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give `model` those tensors of `state` that are not packed in it."""
    own = model.state_dict()
    for name, value in state.items():
        if name in own and (own[name].dtype, own[name].shape) == (value.dtype, value.shape):
            own[name].copy_(value)


def step(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(3, 19).view(2, 8)
    tasks = any(word in str(model.peft_type) for word in ("POLY", "MULTITASK"))
    options = {"task_ids": torch.zeros(2, dtype=torch.long)} if tasks else {}
    torch.manual_seed(5)
    loss = model.train()(input_ids=ids, labels=ids, **options).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | gradients


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def outline(model: nn.Module) -> list[Any]:
    modules = [(name, type(each), set(each.__dict__)) for name, each in model.named_modules()]
    return [*modules, *((name, p.requires_grad) for name, p in model.named_parameters())]


def layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def assert_merges_as(model: Any, stock: Any) -> None:
    for name, expected in layers(stock).items():
        layer = layers(model)[name]
        base = layer.get_base_layer()
        if not isinstance(base, QuantizedLinear):
            continue
        before = base.dequantize()
        try:
            expected.merge()
        except (NotImplementedError, ValueError) as error:
            with pytest.raises(type(error)):
                layer.merge()
            continue
        layer.merge()
        again = copy.deepcopy(base)
        again.requantize(expected.get_base_layer().weight.data)
        difference = base.dequantize() - again.dequantize()
        assert difference.norm() < 0.02 * before.norm(), name
        assert not torch.equal(base.dequantize(), before), name
        error = 0.02 * again.dequantize().norm()
        layer.unmerge()
        assert (base.dequantize() - before).norm() < error, name


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("late", [False, True], ids=("before", "after"))
@pytest.mark.parametrize("method", METHODS, ids=lambda each: each.value.lower())
def test_a_method_is_stock_pefts_or_refused(method: Any, late: bool, decoded: Any) -> None:
    try:
        config = config_of(method)
        stock = adapted(decoded, config)
        begin = state_of(stock)
        expected = step(stock)
    except Exception as error:
        pytest.skip(f"stock PEFT refuses it: {type(error).__name__} {error}")
    model: Any = packed() if late else attach(small(), config)
    before, shape, refused = state_of(model), outline(model), None
    try:
        if late:
            model = attach(model, config)
        else:
            qlora_compile.optimize(model, quantize="int8", tune="off")
    except AdapterMethodError as error:
        refused = error
    if refused is None:
        take(model, begin)
        assert_close(step(model), expected)
        assert_merges_as(model, stock)
        return
    assert method.lower() not in WORKING
    if isinstance(refused, AdapterMethodError):
        assert "layers.0.self_attn.q_proj" in str(refused)
        assert repr(method.lower()) in str(refused)
    assert outline(model) == shape
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    if late:
        config = LoraConfig(target_modules=TARGETS)
        stock = adapted(decoded, config)
        model = attach(model, config)
        take(model, stock.state_dict())
        assert_close(step(model), step(stock))


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"], "all-linear"])
def test_a_method_over_unpacked_linears_alone_is_not_refused(targets: Any) -> None:
    """Nor is another adapter, unless it would be over a packed one."""
    model: Any = packed()
    config = config_of("LOHA", target_modules=targets)
    if targets != ["lm_head"]:
        with pytest.raises(AdapterMethodError, match=r"q_proj: .*'loha'"):
            get_peft_model(model, config)
        assert not layers(model)
        return
    model = pickle.loads(pickle.dumps(get_peft_model(model, config)))
    before = outline(model)
    with pytest.raises(AdapterMethodError, match=r"down_proj: .*'loha'"):
        model.add_adapter("more", config_of("LOHA", target_modules=["lm_head", "down_proj"]))
    assert outline(model) == before


def test_a_merged_method_is_unloaded_and_pickled() -> None:
    model: Any = get_peft_model(packed(), config_of("VERA"))
    assert isinstance(pickle.loads(pickle.dumps(model)), type(model))
    model = model.merge_and_unload()
    assert not layers(model)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), QuantizedLinear)


@pytest.mark.parametrize("method", ["ADALORA", "IA3", "VERA"])
def test_over_bitsandbytes_it_goes_on_as_stock(method: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        config = config_of(method)
        stock = adapted(with_bitsandbytes(small(), 4), config)
        for late in (False, True):
            model: Any = with_bitsandbytes(small(), 4)
            model = model if late else attach(model, config)
            model = qlora_compile.optimize(model, tune="off")
            model = attach(model, config) if late else model
            take(model, stock.state_dict())
            assert_close(step(model), step(stock))


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(("late", "quantize"), [(False, None), (True, "int8")])
def test_compiled_it_is_exact_and_named(late: bool, quantize: str | None, decoded: Any) -> None:
    config = config_of("IA3", target_modules=TARGETS)
    stock = adapted(decoded, config)
    model = copy.deepcopy(decoded)
    model = model if late else attach(model, config)
    model = qlora_compile.optimize(model, quantize=quantize, tune="off")
    model = attach(model, config) if late else model
    take(model, stock.state_dict())
    assert_close(step(model), step(stock))
    sites = {site.name.rpartition(".")[2]: site for site in qlora_compile.explain(model).sites}
    for name, site in sites.items():
        assert site.fused == (name not in (*TARGETS, "lm_head")), site
    assert all("PEFT's ia3, not LoRA" in str(sites[name].reason) for name in TARGETS)


def test_optimize_takes_a_config_of_lora_alone() -> None:
    for method in ("ADALORA", "IA3", "LOHA"):
        model = small()
        before = outline(model)
        with pytest.raises(AdapterConfigError, match="LoraConfig"):
            qlora_compile.optimize(model, config_of(method), quantize="nf4")
        assert outline(model) == before
