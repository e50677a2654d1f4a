"""Thousands of random programs: the passes change no output and no gradient of any of them, and
give a reason for every Linear that they leave."""

from __future__ import annotations

import copy
import re
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import qlora_compile
from qlora_compile.capture.pipeline import run_pipeline
from qlora_compile.passes.calls import base_weights, is_fused
from qlora_compile.passes.context import PassContext
from qlora_compile.passes.nodes import (
    example,
    written_by,
)
from tests.examples import examples
from tests.passes.execution import drop_alike, inputs_of, run, widen
from tests.passes.programs import DTYPES, Program, SiteSpec, Step, programs
from tests.passes.recorder import record
from tests.passes.rewritten import rewritten_graphs
from tests.test_equality import without_inductor

__all__ = ["rewritten_graphs", "without_inductor"]

NARROW_FACTOR = 64
"""In the program's own dtypes ours may be twice as far from float64 as the original is, plus this
many roundings of the coarsest of them."""


def check(program: Program, rows: int, trains_x: bool) -> None:
    x = torch.randn(rows, 8, dtype=program.dtype, requires_grad=trains_x)
    try:
        original = record(program, x)
    except RuntimeError:
        assume(False)  # It writes to what torch lets nobody write to.
        raise
    rewritten = copy.deepcopy(original)
    context = PassContext(frozenset(program.names))
    run_pipeline(rewritten, context)
    assert _sites(original, context) <= context.fused.keys() | context.unfused.keys()

    drop_alike(original, rewritten)
    tensors = inputs_of(program, x, wide=False)
    try:
        plain = run(original, tensors)
    except RuntimeError:
        assume(False)  # It writes to what is expanded, which torch refuses.
        raise
    ours = run(rewritten, tensors)
    eps = max(torch.finfo(dtype).eps for dtype in _dtypes(original))
    for graph_module in (original, rewritten):
        widen(graph_module)
    wide = inputs_of(program, x, wide=True)
    expected, actual = (run(each, wide) for each in (original, rewritten))
    for name, value in expected.items():
        same, mine, theirs = actual[name], ours[name], plain[name]
        if value is None or same is None or mine is None or theirs is None:
            assert value is same is mine is theirs, name
            continue
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
        size = value.norm() + value.numel() ** 0.5
        assert (same - value).norm() <= 1e-9 * size, name
        error, allowed = ((each - value).norm() for each in (mine, theirs))
        assert error <= 2 * allowed + NARROW_FACTOR * eps * size, name


def _sites(graph_module: GraphModule, context: PassContext) -> set[str]:
    weights = []
    for node in graph_module.graph.nodes:
        weights += base_weights(node)
    return {site for weight in weights if (site := context.site_of(weight)) is not None}


def _dtypes(graph_module: GraphModule) -> set[torch.dtype]:
    values = [example(node) for node in graph_module.graph.nodes]
    return {value.dtype for value in values if value is not None and value.is_floating_point()}


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=examples(670, part=6), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), rows=st.sampled_from((4, 4, 2, 0)), trains_x=st.booleans())
def test_a_program_is_computed_as_before(
    dtype: torch.dtype, data: st.DataObject, rows: int, trains_x: bool
) -> None:
    check(data.draw(programs(dtype)), rows, trains_x)


ADAPTED = SiteSpec(rank=2)


@pytest.mark.parametrize(
    ("sites", "steps", "returned"),
    [
        ([ADAPTED], [("linear", 0, 0, 0), ("write_method", 0, 0, 0), ("cast", 1, 2, 0)], [2, 3]),
        ([ADAPTED], [("linear_no_grad", 0, 0, 0), ("linear", 0, 0, 0)], [1, 2]),
        ([ADAPTED._replace(dropout=0.5)], [("linear_no_grad", 0, 0, 0)], [1]),
        ([ADAPTED._replace(style="x written")], [("linear", 0, 0, 0)], [1]),
        (
            [ADAPTED],
            [("linear", 0, 0, 0), ("write_function", 0, 0, 0), ("linear", 0, 0, 0)],
            [1, 3],
        ),
        (
            [ADAPTED],
            [("linear", 0, 0, 0), ("write_function", 0, 1, 0), ("linear", 0, 0, 0)],
            [1, 3],
        ),
        ([ADAPTED._replace(style="base without grad")], [("linear", 0, 0, 0)], [1]),
        (
            [SiteSpec()],
            [
                *(("linear", 0, 0, 0), ("linear", 0, 0, 0), ("linear", 0, 0, 0)),
                *(("add_onto", 3, 0, 0), ("linear_onto", 0, 3, 0), ("linear_onto", 0, 3, 0)),
            ],
            [3],
        ),
    ],
    ids=[
        "x written before a trailing cast",
        "a sibling without grad",
        "dropout without grad",
        "x written between base and adapter",
        "x written by a function between siblings",
        "x written by an argument inplace between siblings",
        "base without grad",
        "x, the result of a linear, written under another name between siblings",
    ],
)
def test_what_once_went_wrong(
    sites: list[SiteSpec], steps: list[Step], returned: list[int]
) -> None:
    check(Program(sites, steps, returned, torch.float32), 4, True)


@settings(max_examples=20, phases=[p for p in Phase if p is not Phase.explain])
@given(program=programs(*DTYPES))
@hypothesis.example(
    program=Program(
        [SiteSpec(style="base without grad"), SiteSpec()],
        [("linear", 0, 0, 0), ("linear_no_grad", 0, 0, 0)],
        [0],
        torch.float32,
    )
)
@hypothesis.example(
    program=Program(
        [SiteSpec(), ADAPTED._replace(k=4, style="x written")],
        [("linear_no_grad", 0, 0, 1)],
        [0],
        torch.float32,
    )
)
@hypothesis.example(program=Program([SiteSpec()], [("transposed", 0, 0, 0)], [1], torch.float32))
def test_the_recorder_captures_what_dynamo_does(program: Program) -> None:
    x = torch.randn(4, 8, dtype=program.dtype, requires_grad=True)
    captured = []

    def keep(graph_module: GraphModule, inputs: object) -> GraphModule:
        captured.append(_described(graph_module))
        return graph_module

    torch._dynamo.reset()
    try:
        program(x.clone())
        torch.compile(program, backend=keep, fullgraph=True)(x.clone())
    except RuntimeError:
        assume(False)  # It writes to what is expanded, or to a view from under no_grad.
    # Dynamo gives nothing to compile where nothing is computed.
    assert (captured or [[]]) == [_described(record(program, x))]


def _described(graph_module: GraphModule) -> list[Any]:
    """Return what each operation computes from which inputs, with gradients or without, but for
    those that nothing comes of. Of the switches themselves Dynamo leaves out some that undo each
    other."""
    described: dict[Node, Any] = {}
    enabled = True
    for node in graph_module.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            (enabled,) = node.args
        elif node.op == "placeholder":
            described[node] = node.meta["grapharg"].source.name
        else:
            inputs = tuple(described[each] for each in node.all_input_nodes)
            # Dynamo reads x.T by this operator from torch 2.14 on.
            target = getattr if node.target is torch.ops.aten.numpy_T else node.target
            described[node] = (node.op, str(target), inputs, enabled)
    living: set[Node] = set()
    for node in reversed(graph_module.graph.nodes):
        lasting = node.op == "output" or node.is_impure() or bool(written_by(node))
        if lasting or not living.isdisjoint(node.users):
            living.add(node)
    calls = ("call_function", "call_method")
    return [each for node, each in described.items() if node in living and node.op in calls]


class Plain(nn.Module):
    """A Linear that PEFT may adapt, in place of a Site."""

    spec = SiteSpec()

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(self.spec.k, self.spec.n, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


SITES = 3
_small = st.integers(0, 7)
harmless_steps = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(("linear", "linear", "residual", "gate", "null_cast", "reshaped")),
            *(_small, _small, st.integers(0, SITES - 1)),
        ),
        st.tuples(st.just("cast"), _small, st.just(2), st.just(0)),  # to float64: loses nothing
    ),
    max_size=8,
).map(lambda drawn: [("linear", 0, 0, 0), *drawn])
"""Steps that keep no Linear from being fused."""


@pytest.mark.usefixtures("without_inductor")
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=harmless_steps,
    bias=st.booleans(),
    adapted=st.sets(st.integers(0, SITES - 1), min_size=1),
)
def test_every_linear_is_fused_where_nothing_forbids_it(
    steps: list[Step], bias: bool, adapted: set[int], rewritten_graphs: list[GraphModule]
) -> None:
    """Compare with PEFT through `optimize` and Dynamo, for a symbolic number of rows too."""
    torch._dynamo.reset()
    rewritten_graphs.clear()
    targets = [f"s{n}.linear" for n in adapted]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    returned = list(range(1, len(steps) + 1))
    program = Program([Plain.spec] * SITES, steps, returned, torch.float32)
    for name in program.names:
        program.add_module(name, Plain(bias))
    stock = get_peft_model(program, config).train()
    ours = qlora_compile.optimize(copy.deepcopy(stock), scope="model")
    # The second number of rows makes their dimension a symbol.
    for rows in (4, 6):
        x = torch.randn(rows, 8)
        expected, actual = (outputs_and_gradients(model, x) for model in (stock, ours))
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            # By norms: elements in which terms cancel carry the roundings of the others.
            error = (actual[name] - value).norm()
            assert error <= 1e-4 * value.norm() + 1e-5, (name, error)

    used = [index for operation, *_, index in steps if operation == "linear"]
    assert len(rewritten_graphs) == 2
    for graph_module in rewritten_graphs:
        fused = filter(is_fused, graph_module.graph.nodes)
        assert sum(len(base_weights(node)) for node in fused) == len(used)
    for site in qlora_compile.explain(ours).sites:
        (index,) = map(int, re.findall(r"\bs(\d)\b", site.name))
        assert site.fused == (index in used), str(site)
        assert site.rank == (2 if index in adapted else 0)


def outputs_and_gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    outputs = model(leaf)
    torch.stack([y.float() for y in outputs]).sum(0).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    values = {f"output {n}": y.detach() for n, y in enumerate(outputs)}
    return values | {"x": leaf.grad} | grads
