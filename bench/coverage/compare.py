"""One model type through stock PEFT and through qlora_compile: two training steps each."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qlora_compile
from bench.agreement import distance
from bench.coverage.kinds import Kind, batch, built
from bench.coverage.row import EQUAL, TRAINS, UNEQUAL, Row, first_line, target_kind, without_names
from qlora_compile.capture import backend
from qlora_compile.capture.regions import region_of
from qlora_compile.hf import expert_adapters
from qlora_compile.report import build_report
from qlora_compile.sites import Inventory

STEPS, LEARNING_RATE = 2, 0.01
TOLERANCE = 2e-5
EXACT_TOLERANCE = 1e-7
"""The tolerance of a run in float64. The same mathematics agrees to 1e-12, or to 1e-8 if a model
computes parts in float32; a toy gradient that float32 gets wrong in the fourth digit (Gemma 4) is
no worse."""

FACTOR = 2.0
"""Without a run in float64, ours may differ from stock this many times as much as stock differs
from itself with every parameter changed by one rounding."""

EXCLUDED = {
    # PEFT refuses it, for their kernels read the weight past the module.
    **dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), "out_proj"),
    # Subclasses of Linear that do not return x Wᵀ: PEFT's layer cannot add to what they return.
    **dict.fromkeys(("llama4", "llama4_text", "phimoe"), "router"),
    "deepseek_v4": "o_a_proj",
}
"""By model type, modules that "all-linear" names and stock PEFT cannot adapt."""


def compared(kind: Kind, *, inductor: bool = False) -> Row:
    """The row of `kind`. Whatever a model raises is a result of the sweep and goes into the row."""
    row = Row(kind.name, kind.family)
    started = time.perf_counter()
    try:
        model, inputs = _stock(kind, row)
        twin = copy.deepcopy(model)
        expected = trained(copy.deepcopy(model), inputs)
        _require_finite(expected)
    except Exception as error:  # the process boundary of the sweep
        row.stock = first_line(error)
        row.seconds = time.perf_counter() - started
        return row
    row.stock = TRAINS
    torch._dynamo.reset()
    counters.clear()
    try:
        with nullcontext() if inductor else _without_inductor():
            ours = qlora_compile.optimize(twin, tune="model")
            actual = trained(ours, inputs)
            _describe(row, ours)
            _compare(row, actual, expected, model, inputs)
    except Exception as error:  # the process boundary of the sweep
        row.ours = first_line(error)
    row.seconds = time.perf_counter() - started
    return row


def _stock(kind: Kind, row: Row) -> tuple[Any, dict[str, Tensor]]:
    plain = built(kind)
    row.model = type(plain).__name__
    row.parameters = sum(parameter.numel() for parameter in plain.parameters())
    inputs = batch(plain)
    torch.manual_seed(1)
    excluded = EXCLUDED.get(plain.config.model_type)

    def config(parameters: list[str] | None) -> LoraConfig:
        return LoraConfig(
            r=4,
            target_modules="all-linear",
            target_parameters=parameters,
            exclude_modules=[excluded] if excluded else None,
            init_lora_weights=False,
        )

    # For some model types PEFT takes "all-linear" to mean experts, too; the others' are named.
    names = sorted(name for name, site in Inventory(plain).experts.items() if site.experts > 1)
    if names:
        probe = get_peft_model(copy.deepcopy(plain), config(None)).get_base_model()
        if any(expert_adapters.active_rank(probe, name) for name in names):
            names = []
    return get_peft_model(plain, config(names or None)).train(), inputs


@contextmanager
def _without_inductor() -> Iterator[None]:
    """Run rewritten graphs through AOTAutograd alone: the same operators, in a tenth of the time,
    as in tests/test_equality.py."""
    from torch._dynamo.backends.debugging import aot_eager

    real = backend.compile_inner
    backend.compile_inner = lambda graph, inputs, *_: aot_eager(graph, inputs)
    try:
        yield
    finally:
        backend.compile_inner = real


def trained(model: nn.Module, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return loss and adapter gradients of every step. The random generator starts each step alike,
    for models that draw from it (hashes, jitter)."""
    steps = []
    for step in range(STEPS):
        torch.manual_seed(step)
        model.zero_grad()
        loss = _loss(model(**inputs))
        loss.backward()
        results = {"loss": loss.detach()[None].clone()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    results[name] = parameter.grad.clone()
                    parameter -= LEARNING_RATE * parameter.grad
        steps.append(results)
    return steps


def _loss(output: Any) -> Tensor:
    """The model's own loss, else the mean square of its first floating-point output."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    values = output.values() if hasattr(output, "values") else output
    first = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    return first.square().mean()


def _require_finite(steps: list[dict[str, Tensor]]) -> None:
    for results in steps:
        for name, value in results.items():
            if not value.isfinite().all():
                raise ArithmeticError(f"not finite in stock: {name}")


def _compare(
    row: Row,
    actual: list[dict[str, Tensor]],
    expected: list[dict[str, Tensor]],
    model: Any,
    inputs: dict[str, Tensor],
) -> None:
    """Compare ours with stock. model: stock before its first step, to tell rounding from another
    result."""
    if actual[-1].keys() != expected[-1].keys():
        missing = sorted(actual[-1].keys() ^ expected[-1].keys())
        row.ours, row.worst = UNEQUAL, f"only one has a gradient: {missing[0]}"
        return
    row.errors = largest(actual, expected)
    row.worst = _worst(actual[0], expected[0])
    equal = all(error <= TOLERANCE for error in row.errors.values())
    if not equal:
        # Only after the run in float32 has been read: this one compiles the blocks anew.
        row.exact = _in_float64(model, inputs)
        row.floor = _after_one_rounding(model, expected, inputs)
        equal = bool(row.exact) and max(row.exact.values()) <= EXACT_TOLERANCE
        equal |= all(error <= FACTOR * row.floor[group] for group, error in row.errors.items())
    row.ours = EQUAL if equal else UNEQUAL


def largest(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the largest relative distance of any step per group: loss, lora_A, lora_B."""
    found: dict[str, float] = {}
    for left, right in zip(one, other, strict=True):
        for group, error in distance(left, right).items():
            found[group] = max(found.get(group, 0.0), error)
    return found


def _worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    # A gradient that is zero but for rounding, as of a router that takes one expert, tells nothing.
    least = 1e-3 * max(float(expected[name].norm()) for name in expected if name != "loss")

    def error(name: str) -> float:
        difference = (actual[name] - expected[name]).norm()
        return float(difference / expected[name].norm().clamp_min(least))

    name = max(actual, key=error)
    return f"{name} ({error(name):.1e})"


def _in_float64(model: Any, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Compare ours and stock in float64; return nothing if the model does not run in float64."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    stock = copy.deepcopy(model).double()
    ours = copy.deepcopy(stock)
    try:
        expected = trained(stock, wide)
    except (RuntimeError, TypeError, ValueError):  # it makes float32 tensors of its own
        return {}
    return largest(trained(qlora_compile.optimize(ours, tune="model"), wide), expected)


def _after_one_rounding(
    model: Any, expected: list[dict[str, Tensor]], inputs: dict[str, Tensor]
) -> dict[str, float]:
    """Return how far stock is from stock with every parameter rounded up or down; the largest of
    three trials."""
    found: dict[str, float] = {}
    for seed in range(3):
        changed = copy.deepcopy(model)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter *= 1 + torch.finfo(torch.float32).eps * torch.randn_like(parameter).sign()
        for group, error in largest(trained(changed, inputs), expected).items():
            found[group] = max(found.get(group, 0.0), error)
    return found


def _describe(row: Row, ours: Any) -> None:
    report = build_report(Inventory(ours))
    linears = [site for site in report.sites if not site.experts]
    row.sites, row.fused = len(linears), sum(site.fused for site in linears)
    targets = [site for site in linears if site.rank]
    row.targets = len(targets)
    row.fused_targets = sum(site.fused for site in targets)
    left = [site for site in linears if not site.fused]
    row.left = dict(Counter(without_names(str(site.reason)) for site in left))
    row.left_targets = dict(Counter(without_names(str(s.reason)) for s in left if s.rank))
    for site in sorted(left, key=lambda site: not site.rank):
        row.examples.setdefault(without_names(str(site.reason)), site.name)
    weights = [site for site in report.sites if site.experts and site.rank]
    row.expert_targets = len(weights)
    row.fused_experts = sum(site.fused for site in weights)
    row.left_experts = dict(
        Counter(without_names(str(site.reason)) for site in weights if not site.fused)
    )
    adapted = (*targets, *weights)
    row.target_parameters = sum(site.parameters for site in adapted)
    row.fused_parameters = sum(site.parameters for site in adapted if site.fused)
    known = {site.name for site in report.sites}
    known |= {site.name.rpartition(".")[0] for site in weights}
    row.other_targets = dict(
        Counter(
            target_kind(type(module.get_base_layer()).__name__)
            for name, module in ours.named_modules()
            if isinstance(module, LoraLayer) and name.replace(".base_layer", "") not in known
        )
    )
    row.kinds = len({id(r.kind) for m in ours.modules() if (r := region_of(m)) is not None})
    row.graphs = counters["stats"]["unique_graphs"]
    for reason, count in counters["graph_break"].items():
        key = without_names(reason)
        row.breaks[key] = row.breaks.get(key, 0) + count
