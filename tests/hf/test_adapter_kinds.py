"""Every kind of adapter PEFT has, and every way to choose one: exact, and reported as it ran."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import Tensor, nn

import qlora_compile
from bench.agreement import distance
from qlora_compile.errors import AdapterConfigError
from qlora_compile.hf import loading
from qlora_compile.kernels.registry import FORMATS
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.report import Report
from tests.examples import LONG
from tests.kernels.linear_cases import double_quantizes
from tests.test_equality import FLOAT32_TOLERANCE, step, without_inductor
from tests.toy_language_model import toy_llama
from tests.toy_models import tokens, toy, with_bitsandbytes

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")

FUSED = None
NOT_PLAIN = "its adapter's computation is not plain LoRA; the base product alone is fused"
SPLIT = "graph breaks split its block into"
HOOKED = "its block ran uncompiled: each row was given its adapter"

KINDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, FUSED),
    "OLoRA": ({"init_lora_weights": "olora"}, FUSED),
    "MiCA": ({"init_lora_weights": "mica"}, FUSED),
    "KaSA": ({"kasa_config": KasaConfig()}, NOT_PLAIN),
    "BdLoRA": ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["0"], nblocks=2)}, NOT_PLAIN),
    "VeLoRA": ({"velora_config": VeloraConfig()}, SPLIT),
    "MonteCLoRA": ({"monteclora_config": MontecloraConfig()}, SPLIT),
}


def adapted(options: dict[str, Any]) -> Any:
    """Return a model of one adapted Linear, the same for the same `options` of LoraConfig."""
    torch.manual_seed(0)
    base: Any = nn.Sequential(nn.Linear(64, 128), nn.Tanh())
    config = LoraConfig(r=4, target_modules=["0"], **copy.deepcopy(options))
    model: Any = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def training_step(model: Any) -> dict[str, Tensor]:
    x = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    y = model.train()(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients}


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_of_lora_is_exact_and_named(kind: str) -> None:
    options, reason = KINDS[kind]
    results: list[dict[str, Tensor]] = []
    report: Report | None = None
    for optimized in (False, True):
        model = adapted(options)
        if optimized:
            model = qlora_compile.optimize(model)
        results.append(training_step(model))
        report = qlora_compile.explain(model) if optimized else None
    stock, ours = results
    assert stock.keys() == ours.keys()
    for name, expected in stock.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    assert report is not None
    (site,) = report.sites
    assert site.fused == (reason is None)
    assert str(site.reason).startswith(str(reason)), str(report)


READ_THE_BASE = [kind for kind in KINDS if kind != "MonteCLoRA"]


@pytest.mark.parametrize("kind", KINDS)
def test_optimize_attaches_what_peft_attaches(kind: str) -> None:
    stock = adapted(KINDS[kind][0])
    torch.manual_seed(0)
    base: Any = nn.Sequential(nn.Linear(64, 128), nn.Tanh())
    config = LoraConfig(r=4, target_modules=["0"], **copy.deepcopy(KINDS[kind][0]))
    ours: Any = qlora_compile.optimize(base, config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected, found = training_step(stock), training_step(ours)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("format", [each.name for each in FORMATS])
@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_the_base_is_not_attached_over_codes(kind: str, format: str) -> None:
    def config() -> LoraConfig:
        return LoraConfig(r=4, target_modules=["0"], **copy.deepcopy(KINDS[kind][0]))

    plain: Any = nn.Sequential(nn.Linear(64, 128), nn.Tanh())
    packed: Any = qlora_compile.optimize(copy.deepcopy(plain), quantize=format, tune="model")
    if kind in READ_THE_BASE:
        given: list[tuple[Any, dict[str, Any]]] = [(plain, {"quantize": format}), (packed, {})]
        for model, options in given:
            kinds, before = [*map(type, model.modules())], model.state_dict()
            ways = (lambda: qlora_compile.optimize(model, config(), tune="model", **options),)  # noqa: B023
            ways += (lambda: get_peft_model(model, config()),) * (model is packed)  # noqa: B023
            for way in ways:
                with pytest.raises(AdapterConfigError, match="over packed weights"):
                    way()
            assert [*map(type, model.modules())] == kinds
            assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        return
    for model in (
        qlora_compile.optimize(plain, config(), quantize=format, tune="model"),
        qlora_compile.optimize(packed, config(), tune="model"),
    ):
        assert all(each.isfinite().all() for each in training_step(model).values())


OVER_FORMATS = KINDS | {
    "LoRA": ({}, FUSED),
    "rsLoRA": ({"use_rslora": True}, FUSED),
    "DoRA": ({"use_dora": True}, FUSED),
}
NAMES = [each.name for each in FORMATS]
PAIRS = (
    itertools.product(OVER_FORMATS, NAMES)
    if LONG
    else zip(itertools.cycle(OVER_FORMATS), NAMES, strict=False)
)


@pytest.mark.parametrize(("kind", "format"), list(PAIRS))
def test_a_variant_of_lora_is_exact_over_every_format(kind: str, format: str) -> None:
    """Beside stock PEFT over the dense weight that the codes stand for."""
    options, reason = OVER_FORMATS[kind]
    results: list[dict[str, Tensor]] = []
    for packs in (False, True):
        model = adapted(options)
        if packs:
            model = qlora_compile.optimize(model, quantize=format, tune="model")
        else:
            layer = model.get_base_model()[0].base_layer
            usual: Any = {"double_quantize": True} if double_quantizes(format) else {}
            packed = QuantizedLinear.from_linear(layer, format, **usual)
            layer.weight.data = packed.dequantize()
        results.append(training_step(model))
    stock, ours = results
    assert stock.keys() == ours.keys()
    for name, expected in stock.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4, msg=name)
    (site,) = qlora_compile.explain(model).sites
    assert site.format.startswith(format)
    assert site.fused or reason is not None


def _two_adapters(base: str) -> Any:
    model: Any = toy()
    if base == "bnb-4bit":
        model = with_bitsandbytes(model, 4)
    torch.manual_seed(1)
    options: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(r=4, **options))
    model.add_adapter("other", LoraConfig(r=3, use_rslora=True, **options))
    return model.eval()


@pytest.mark.parametrize("base", ["plain", "bnb-4bit"])
def test_a_batch_that_names_its_adapters_is_exact(base: str) -> None:
    """Also where a graph for the active adapter has been compiled before: it must not serve."""
    stock, ours = _two_adapters(base), qlora_compile.optimize(_two_adapters(base))
    ids = tokens(3, 8)
    names: list[list[str] | None] = [None, ["default", "other", "__base__"], ["other"] * 3, None]
    results = []
    with torch.no_grad():
        for each in names:
            chosen = {} if each is None else {"adapter_names": each}
            ours_y, stock_y = (
                model(input_ids=ids, use_cache=False, **chosen).logits for model in (ours, stock)
            )
            torch.testing.assert_close(ours_y, stock_y, rtol=1e-4, atol=1e-4)
            results.append(ours_y)
            sites = qlora_compile.explain(ours).sites[:-1]
            assert all(site.fused == (each is None) for site in sites)
            assert each is None or all(str(site.reason).startswith(HOOKED) for site in sites)
    assert not torch.allclose(results[0], results[1], atol=1e-2)
    assert not torch.allclose(results[0], results[2], atol=1e-2)


def test_alora_trains_as_stock() -> None:
    """An adapter that sets in at a row's own position, handed to its layers by hooks."""
    models: list[Any] = []
    for optimized in (False, True):
        model: Any = toy()
        torch.manual_seed(1)
        config = LoraConfig(
            r=4,
            target_modules="all-linear",
            init_lora_weights=False,
            alora_invocation_tokens=[5, 6],
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        models.append((qlora_compile.optimize(model) if optimized else model).train())
    for start in (4, 9):
        ids = tokens(2, 16)
        ids[:, start], ids[:, start + 1] = 5, 6
        for group, error in distance(*(step(model, ids) for model in reversed(models))).items():
            assert error < FLOAT32_TOLERANCE, group
    sites = qlora_compile.explain(models[1]).sites[:-1]
    assert all(str(site.reason).startswith(HOOKED) for site in sites)


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_a_model_that_is_packed_in_part_is_not_adapted_in_part(init: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    model[2] = QuantizedLinear.from_linear(model[2], "nf4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config: Any = LoraConfig(r=4, target_modules=["0", "2"])
    config.init_lora_weights = init
    with pytest.raises(AdapterConfigError, match="over packed weights"):
        qlora_compile.optimize(model, config)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_packed_base_is_loaded_as_the_initialisation_left_it(tmp_path: Path) -> None:
    """And not initialised from again."""
    base = toy_llama()
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    model: Any = qlora_compile.optimize(get_peft_model(base, config), quantize="nf4", tune="model")
    qlora_compile.save(model, tmp_path)
    again = qlora_compile.load(tmp_path, dtype=torch.float32)
    again = qlora_compile.optimize(loading.with_adapter(again, tmp_path / "adapter"), tune="model")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected, found = (
            each.eval()(input_ids=ids, use_cache=False).logits for each in (model, again)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_lora_ga_has_initialised_is_loaded_over_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain: Any = nn.Sequential(nn.Linear(64, 128), nn.Tanh())
    adapter = get_peft_model(
        copy.deepcopy(plain), LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    adapter.save_pretrained(str(tmp_path))
    written = tmp_path / "adapter_config.json"
    written.write_text(
        json.dumps(json.loads(written.read_text()) | {"init_lora_weights": "lora_ga"})
    )
    packed = qlora_compile.optimize(plain, quantize="nf4", tune="model")
    loaded: Any = PeftModel.from_pretrained(packed, str(tmp_path))
    expected = dict(adapter.named_parameters())
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(parameter, expected[name])
