"""Thousands of random programs: the passes change no output and no gradient of any of them, and
give a reason for every Linear that they leave."""

from __future__ import annotations

import copy

import hypothesis
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_compile.passes.context import PassContext
from qlora_compile.passes.nodes import calls, example, is_linear, linear_operands, stored_weight
from qlora_compile.pipeline import run_pipeline
from tests.passes.execution import drop_alike, inputs_of, run, widen
from tests.passes.programs import Program, programs
from tests.passes.recorder import record


@settings(
    max_examples=int(__import__("os").environ.get("N", "2000")),
    phases=eval(__import__("os").environ.get("PH", "None")) or tuple(hypothesis.Phase),
)
@given(program=programs, rows=st.sampled_from((4, 4, 2, 0)), trains_x=st.booleans())
def test_a_program_is_computed_as_before(program: Program, rows: int, trains_x: bool) -> None:
    x = torch.randn(rows, 8, dtype=program.dtype, requires_grad=trains_x)
    original = record(program, x)
    rewritten = copy.deepcopy(original)
    context = PassContext(frozenset(program.names))
    run_pipeline(rewritten, context)

    linears = [node for node in original.graph.nodes if is_linear(node)]
    weights = [stored_weight(linear_operands(node)[1]) for node in linears]
    weights += [stored_weight(c["planes"][0]) for n in original.graph.nodes for c in calls(n)]
    sites = {context.site_of(weight) for weight in weights} - {None}
    assert sites <= context.fused.keys() | context.unfused.keys()

    drop_alike(original, rewritten)
    tensors = inputs_of(program, x, wide=False)
    try:
        plain = run(original, tensors)
    except RuntimeError:
        # It writes to what is expanded.
        assume(False)
        raise
    ours = run(rewritten, tensors)
    for graph_module in (original, rewritten):
        widen(graph_module)
    wide = inputs_of(program, x, wide=True)
    exact, after = (run(each, wide) for each in (original, rewritten))
    eps = max(torch.finfo(dtype).eps for dtype in dtypes_of(original))
    for name, value in exact.items():
        mine, theirs = ours[name], plain[name]
        assert (mine is None) == (after[name] is None) == (value is None), name
        if value is None:
            continue
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
        size = value.norm() + value.numel() ** 0.5
        assert (after[name] - value).norm() <= 1e-9 * size, name
        error, allowed = ((each - value).norm() for each in (mine, theirs))
        assert error <= 2 * allowed + 64 * eps * size, name


def dtypes_of(graph_module):
    """The floating-point ones of the values in it."""
    values = [example(node) for node in graph_module.graph.nodes]
    return {value.dtype for value in values if value is not None and value.is_floating_point()}
