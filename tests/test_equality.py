"""optimize() computes what stock PEFT computes: outputs and every gradient, through capture,
rewriting and AOTAutograd. Inductor compiles behind them in the last test and in the others'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qlora_compile
from bench.agreement import Errors, distance, training_step
from qlora_compile.capture import backend
from qlora_compile.kernels.dropout import keep_mask
from qlora_compile.kernels.registry import FORMATS, VARIANTS, format_named
from qlora_compile.modules.linear import QuantizedLinear
from tests.toy_models import tokens, toy, with_bitsandbytes


class Setting(NamedTuple):
    base: str
    precision: str
    checkpointing: str
    dropout: float
    bias: bool


SETTINGS = (
    Setting("plain", "float32", "none", 0.1, True),
    Setting("plain", "bfloat16", "reentrant", 0.0, False),
    Setting("plain", "autocast", "nonreentrant", 0.0, True),
    Setting("bnb-4bit", "float32", "reentrant", 0.0, True),
    Setting("bnb-4bit", "bfloat16", "nonreentrant", 0.0, False),
    Setting("bnb-4bit", "autocast", "none", 0.1, True),
    Setting("bnb-8bit", "float32", "nonreentrant", 0.0, False),
    Setting("bnb-8bit", "bfloat16", "none", 0.0, True),
    Setting("bnb-8bit", "autocast", "reentrant", 0.1, False),
    Setting("nf4", "float32", "none", 0.0, False),
    Setting("nf4", "bfloat16", "reentrant", 0.1, True),
    Setting("nf4", "autocast", "nonreentrant", 0.1, False),
    Setting("fp4", "float32", "reentrant", 0.1, False),
    Setting("fp4", "bfloat16", "nonreentrant", 0.1, True),
    Setting("fp4", "autocast", "none", 0.0, False),
    Setting("int8", "float32", "nonreentrant", 0.1, True),
    Setting("int8", "bfloat16", "none", 0.1, False),
    Setting("int8", "autocast", "reentrant", 0.0, True),
)
"""Every two values of different columns meet, and every three of the last four columns."""

SHAPES = ((1, 16), (3, 7), (3, 24), (2, 33), (4, 24), (5, 16), (2, 40), (3, 31))

FLOAT32_TOLERANCE = 2e-5

BF16_FACTOR = 1.5
"""Ours may be this much farther from the float32 run than stock's bfloat16 run is."""


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr(
        backend, "compile_inner", lambda graph, inputs, *_: aot_eager(graph, inputs)
    )


@pytest.fixture
def as_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs rewritten graphs as they are: AOTAutograd, which other tests show, takes a third of the
    time of a compilation. For tests of what is captured, when, and how often."""
    monkeypatch.setattr(backend, "compile_inner", lambda graph, *_: graph.forward)


def lora(dropout: float = 0.0, **options: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(lora_dropout=dropout, **(defaults | options))


def build(
    base: str, dtype: torch.dtype, dropout: float, bias: bool, layers: int = 2, **options: Any
) -> list[Any]:
    """Return a stock PeftModel, and the optimised one with the same weights."""
    models: list[Any] = []
    sizes = {"num_hidden_layers": layers, "attention_bias": bias, "mlp_bias": bias}
    for optimized in (False, True):
        model = toy("Llama", dtype, **sizes)
        if base.startswith("bnb"):
            model = with_bitsandbytes(model, int(base[4]))
        own = base in {each.name for each in FORMATS}
        if own and not optimized:
            _round_trip(model, base)
        torch.manual_seed(1)
        if optimized and own:
            model = qlora_compile.optimize(model, lora(dropout), quantize=base, **options)
        else:
            model = get_peft_model(model, lora(dropout))
            model = qlora_compile.optimize(model, **options) if optimized else model
        models.append(model.train())
    # PEFT rounds new adapters to a plain Linear's bfloat16, but not to what is packed.
    stock = dict(models[0].named_parameters())
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if "lora_" in name:
                parameter.copy_(stock[name])
    return models


def _round_trip(model: nn.Module, format: str) -> None:
    """Give the stock model the values the packed one decodes."""
    double = format_named(format).has_double_quantize
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and "lm_head" not in name:
            packed = QuantizedLinear.from_linear(linear, format, double_quantize=double)
            linear.weight.data = packed.dequantize()


def step(model: nn.Module, ids: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return training_step(model, ids)


@contextmanager
def recorded_masks() -> Iterator[dict[int, Tensor]]:
    """Dropout masks of the fused calls, by the address of their lora_a."""
    masks: dict[int, Tensor] = {}

    def recorded(forward: Any) -> Any:
        def recording(self, group, config):
            for tensors, spec in group:
                if tensors.seed is not None and tensors.lora_a is not None:
                    rows = (0, tensors.x.shape[0])
                    keep = keep_mask(tensors.seed, spec.stream, spec.dropout, rows, spec.k)
                    previous = masks.setdefault(tensors.lora_a.data_ptr(), keep)
                    assert torch.equal(previous, keep), "recomputation drew another mask"
            return forward(self, group, config)

        return recording

    with pytest.MonkeyPatch.context() as patch:
        for variant in map(type, VARIANTS):
            patch.setattr(variant, "forward_group", recorded(variant.forward_group))
        yield masks


class ReplayDropout(nn.Module):
    def __init__(self, keep: Tensor, probability: float) -> None:
        super().__init__()
        self.keep, self.probability = keep, probability

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keep.view(x.shape) / (1.0 - self.probability)


def replay(stock: Any, optimized: Any, masks: dict[int, Tensor], p: float) -> None:
    """Make the stock model drop exactly what the optimised one dropped."""
    layers = dict(stock.named_modules())
    replayed = 0
    for name, layer in optimized.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            keep = masks[layer.lora_A["default"].weight.data_ptr()]
            layers[name].lora_dropout["default"] = ReplayDropout(keep, p)
            replayed += 1
    assert replayed == len(masks) > 0


def test_every_two_values_meet_in_some_setting() -> None:
    values = [set(column) for column in zip(*SETTINGS, strict=True)]
    assert [len(each) for each in values] == [6, 3, 3, 2, 2]
    for first, second in combinations(range(len(values)), 2):
        met = {(setting[first], setting[second]) for setting in SETTINGS}
        assert met == set(product(values[first], values[second]))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.usefixtures("without_inductor")
def test_a_training_step_equals_stock(setting: Setting) -> None:
    dtype = torch.bfloat16 if setting.precision == "bfloat16" else torch.float32
    autocast = setting.precision == "autocast"
    stock, ours = build(setting.base, dtype, setting.dropout, setting.bias)
    for model in (stock, ours):
        if setting.checkpointing != "none":
            model.enable_input_require_grads()
            reentrant = setting.checkpointing == "reentrant"
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    exact = build(setting.base, dtype, setting.dropout, setting.bias)[0]
    _widen(exact)
    errors = Errors()
    counters.clear()
    for shape in SHAPES[:2] if setting.precision == "float32" else SHAPES:
        ids = tokens(*shape)
        with recorded_masks() as masks:
            actual = step(ours, ids, autocast)
        if setting.dropout:
            for model in (stock, exact):
                replay(model, ours, masks, setting.dropout)
        expected = step(stock, ids, autocast)
        if setting.precision == "float32":
            for group, error in distance(actual, expected).items():
                assert error < FLOAT32_TOLERANCE, group
            continue
        errors.add(actual, expected, step(exact, ids))
    for group, (mine, theirs) in errors.by_group().items():
        if group != "loss":  # one number: the two errors' ratio is luck
            assert mine <= BF16_FACTOR * theirs, group
    assert not counters["graph_break"]
    report = qlora_compile.explain(ours)
    assert report.fused == len(report.sites) - 1, str(report)


def _widen(model: Any) -> None:
    """The same weights, all arithmetic in float32; bitsandbytes' layers are replaced."""
    for module in list(model.modules()):
        base: Any = getattr(module, "base_layer", None)
        if base is not None and type(base).__module__.startswith("bitsandbytes"):
            from peft.utils.integrations import dequantize_bnb_weight

            weight = dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))
            linear = nn.Linear(base.in_features, base.out_features, base.bias is not None)
            linear.weight.data = weight.float()
            if base.bias is not None:
                linear.bias.data = base.bias.data.float()
            linear.requires_grad_(False)
            module.base_layer = linear
    model.float()


@pytest.mark.usefixtures("without_inductor")
def test_thirty_steps_follow_stock_peft_and_bitsandbytes(tmp_path: Path) -> None:
    """Our NF4 against stock PEFT over bitsandbytes' NF4; the order of a batch's rows is how far two
    valid runs of stock differ. What was trained writes the same in stock PEFT."""
    stock = build("bnb-4bit", torch.float32, 0.0, False)[0]
    reordered = build("bnb-4bit", torch.float32, 0.0, False)[0]
    ours = build("nf4", torch.float32, 0.0, False)[1]
    runs = {"stock": stock, "reordered": reordered, "ours": ours}
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3)
        for name, m in runs.items()
    }
    data = [tokens(3, 16) for _ in range(4)]
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(30):
        for name, model in runs.items():
            ids = data[index % 4]
            loss = step(model, ids.flip(0) if name == "reordered" else ids)["loss"]
            optimizers[name].step()
            losses[name].append(float(loss))
    assert losses["ours"][-1] < losses["ours"][2]
    spread = max(abs(a - b) for a, b in zip(losses["reordered"], losses["stock"], strict=True))
    error = max(abs(a - b) for a, b in zip(losses["ours"], losses["stock"], strict=True))
    # At toy size the spread is one rounding of the loss; two or three of them tell nothing.
    assert error <= max(spread, 4 * torch.finfo(torch.float32).eps * losses["stock"][0])

    ours.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(with_bitsandbytes(toy(), 4), tmp_path)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    written, expected = (
        model.eval().generate(input_ids=data[0], **arguments) for model in (fresh, ours)
    )
    assert torch.equal(written, expected)


def test_through_inductor_equals_stock() -> None:
    stock, ours = build("nf4", torch.float32, 0.1, True)
    ids = tokens()
    with recorded_masks() as masks:
        actual = step(ours, ids)
    replay(stock, ours, masks, 0.1)
    for group, error in distance(actual, step(stock, ids)).items():
        assert error < 2e-5, group
