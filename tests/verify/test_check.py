"""The check of a rewrite: what is right passes, and every planted fault is found and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

import qlora_compile
from qlora_compile import errors
from qlora_compile.capture import backend, inductor, pipeline
from qlora_compile.capture.regions import region_of
from qlora_compile.kernels import attention
from qlora_compile.kernels.call import Call, LinearCall
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.registry import FORMATS
from qlora_compile.kernels.specification import specified_experts, specified_linears
from qlora_compile.passes import attention as attention_pass
from qlora_compile.passes.calls import is_fused, read
from qlora_compile.verify.check import IN_FLOAT32, CapturedInput, check
from tests.kernels.experts_reference import experts_reference
from tests.test_equality import lora, step
from tests.toy_models import tokens, toy


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph as it is: what compiles it is not under test."""
    monkeypatch.setattr(backend, "compile_inner", lambda graph, inputs, *_: graph.forward)


def verified(
    architecture: str, dtype: torch.dtype, dropout: float = 0.0, *, strict: bool = False
) -> tuple[Any, Any]:
    """Return an optimised model with adapters that begin as PEFT's do, and its report after a
    step."""
    config = lora(dropout, init_lora_weights=True)
    model = toy(architecture, dtype, num_hidden_layers=1)
    model = qlora_compile.optimize(
        model, config, quantize="nf4", tune="model", verify=True, strict=strict
    ).train()
    step(model, tokens())
    return model, qlora_compile.explain(model)


@pytest.mark.parametrize(
    ("architecture", "dtype", "dropout"),
    [
        ("Llama", torch.float32, 0.1),
        ("Gemma3", torch.bfloat16, 0.0),
        ("Phi3", torch.bfloat16, 0.1),
        ("Bert", torch.float64, 0.1),
    ],
)
def test_a_right_rewrite_has_a_certificate(
    architecture: str, dtype: torch.dtype, dropout: float
) -> None:
    model, report = verified(architecture, dtype, dropout)
    assert not report.mismatches
    blocks = {type(m).__name__ for m in model.modules() if region_of(m) is not None}
    assert {certificate.region for certificate in report.certificates} == blocks
    for certificate in report.certificates:
        cases = ["real", "random"]
        if dropout:
            cases.append("random, dropped out")
        else:
            cases = [kind for case in cases for kind in (case, f"{case}, compiled")]
        cases += ["random, dropped out, compiled"] * bool(dropout)
        cases += [IN_FLOAT32] * (dtype == torch.bfloat16)
        assert list(certificate.inputs) == cases
        assert certificate.reference == "float64"
        assert all(comparison.passes for comparison in certificate.comparisons)
        assert any(name.startswith("backward ") for name in certificate.kernels)
        compared = [c.tensor for c in certificate.comparisons if c.inputs == "random"]
        assert "output 0" in compared
        region = next(
            m for m in model.modules() if region_of(m) and type(m).__name__ == certificate.region
        )
        trained = [name for name, p in region.named_parameters() if p.requires_grad]
        assert trained
        assert {f"gradient of {name.removesuffix('.weight')}" for name in trained} <= {
            tensor.removesuffix(".weight") for tensor in compared
        }
        assert str(certificate) in str(report)


@pytest.mark.parametrize("fault", ["output", "gradient"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_fault_of_the_compiler_is_found(
    fault: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        part = x * 0.01
        return x + (part if fault == "output" else part - part.detach())

    def compiled(graph: GraphModule, *_: Any) -> Callable[..., Any]:
        return lambda *args: tree_map_only(torch.Tensor, wrong, graph(*args))

    monkeypatch.setattr(backend, "compile_inner", compiled)
    _, report = verified("Llama", torch.float32, dropout)
    (mismatch,) = report.mismatches
    kind = "random, dropped out, compiled" if dropout else "real, compiled"
    tensor = "output 0" if fault == "output" else "gradient of .*"
    assert re.match(rf"LlamaDecoderLayer: {tensor} \(inputs: {kind}\) is off by 1.0e-02", mismatch)
    assert report.fused == 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_inductor_makes_is_compared(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "compile_inner", inductor.compile_inner)
    model: Any = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh())
    config = lora(dropout, target_modules=["0"])
    model = qlora_compile.optimize(model, config, verify=True, tune="model").train()
    # Neither the strides of this input nor the number of its elements are those of a whole tensor.
    x = torch.randn(16, 3).t()[:, None].expand(3, 2, 16)
    model(x).sum().backward()
    (certificate,) = qlora_compile.explain(model).certificates
    assert certificate.uncompared is None
    assert sum(kind.endswith(", compiled") for kind in certificate.inputs) == (1 if dropout else 2)


class Jitter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * torch.empty_like(x).uniform_(0.9, 1.1))


def test_a_graph_that_draws_is_compared_uncompiled() -> None:
    model: Any = Jitter()
    model = qlora_compile.optimize(model, lora(target_modules=["linear"]), verify=True).train()
    model(torch.randn(3, 16)).sum().backward()
    (certificate,) = qlora_compile.explain(model).certificates
    assert certificate.inputs == ("real", "random")
    assert "without its compiled code: the graph draws random numbers" in str(certificate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dropout_before_base_and_adapter_is_not_lost(dtype: torch.dtype) -> None:
    model = toy(dtype=dtype, num_hidden_layers=1).requires_grad_(False)
    config = lora(0.1, use_dora=True)
    model = qlora_compile.optimize(model, config, verify=True, tune="model").train()
    step(model, tokens())
    report = qlora_compile.explain(model)
    assert not report.mismatches
    assert len(report.certificates) == 1


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.linear(x).tanh())


def test_a_linear_that_is_called_twice_drops_out_in_both() -> None:
    config = lora(0.5, target_modules=["linear"])
    model: Any = qlora_compile.optimize(Twice(), config, verify=True, tune="model").train()
    model(torch.randn(8, 16)).sum().backward()
    report = qlora_compile.explain(model)
    assert not report.mismatches
    assert len(report.certificates) == 1


def test_a_check_inside_a_checkpoint_leaves_the_checkpoint_alone() -> None:
    gradients = []
    for verify in (False, True):
        model = toy(num_hidden_layers=1)
        model = qlora_compile.optimize(model, lora(), quantize="nf4", verify=verify).train()
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        torch.manual_seed(0)
        gradients.append(step(model, tokens()))
    assert len(qlora_compile.explain(model).certificates) == 1
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value)


def test_autocast_is_checked_against_float64() -> None:
    config = lora(0.1, init_lora_weights=True)
    model = toy(num_hidden_layers=1)
    model = qlora_compile.optimize(model, config, quantize="nf4", verify=True).train()
    step(model, tokens(), autocast=True)
    (certificate,) = qlora_compile.explain(model).certificates
    assert (certificate.dtype, certificate.reference) == ("bfloat16", "float64")
    # Of the plain computation in bfloat16: the reference is not computed in it.
    assert max(c.plain_error for c in certificate.comparisons if c.inputs == "real") > 1e-3


def fused(graph: GraphModule, number: int) -> Node:
    return [node for node in graph.graph.nodes if is_fused(node)][number]


def result(graph: GraphModule) -> Node:
    """Return what the last fused call of a graph returns."""
    (node,) = fused(graph, -1).users
    return node


def rewrite(node: Node, **changes: Any) -> None:
    """The fused call `node` of a single Linear with other nodes for its tensors."""
    call = read(node)
    linears = (replace(call.linears[0], **changes),)
    node.args = replace(call, linears=linears).arguments


def changed(node: Node, target: Any, *args: Any) -> Node:
    """Return target(node, *args) in place of `node` for all its users."""
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, (node, *args))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    new.meta = dict(node.meta)
    return new


def one_per_cent(graph: GraphModule) -> None:
    changed(result(graph), torch.mul, 1.01)


def one_per_cent_of_a_gradient(graph: GraphModule) -> None:
    node = fused(graph, -1)
    x = node.args[0]
    assert isinstance(x, Node)
    with graph.graph.inserting_before(node):
        part = graph.graph.call_function(torch.mul, (x, 0.01))
        still = graph.graph.call_method("detach", (part,))
        rest = graph.graph.call_function(torch.sub, (x, part))
        whole = graph.graph.call_function(torch.add, (rest, still))
    for new in (part, still, rest, whole):
        new.meta = dict(x.meta)
    node.args = (whole, *node.args[1:])


def not_a_number(graph: GraphModule) -> None:
    changed(result(graph), torch.mul, float("nan"))


def swapped_adapters(graph: GraphModule) -> None:
    calls = filter(is_fused, graph.graph.nodes)
    group = next(node for node in calls if len(read(node).linears) == 2)
    call = read(group)
    one, other = call.linears
    swapped = (
        replace(one, lora_a=other.lora_a, lora_b=other.lora_b),
        replace(other, lora_a=one.lora_a, lora_b=one.lora_b),
    )
    group.args = replace(call, linears=swapped).arguments


def missing_gradient(graph: GraphModule) -> None:
    node = fused(graph, -1)
    with graph.graph.inserting_before(node):
        detached = graph.graph.call_method("detach", (read(node).linears[0].lora_a,))
    rewrite(node, lora_a=detached)


def lost_dropout(graph: GraphModule) -> None:
    node = fused(graph, -1)
    node.args = read(node).without_dropout().arguments


def changed_scaling(graph: GraphModule) -> None:
    node = fused(graph, -1)
    scaling = read(node).linears[0].scaling
    with graph.graph.inserting_before(node):
        changed = graph.graph.call_function(torch.mul, (scaling, 1.25))
    changed.meta = dict(scaling.meta)
    rewrite(node, scaling=changed)


FAULTS = {
    one_per_cent: r"output 0 \(inputs: .*\) is off by .* of its norm, allowed",
    one_per_cent_of_a_gradient: "gradient of .* is off by",
    not_a_number: r"output 0 \(inputs: real\) holds 2048 NaN or infinite values",
    swapped_adapters: r"gradient of mlp.gate_proj.lora_B.default.weight \(inputs: real\) is off by",
    missing_gradient: r"gradient of mlp.down_proj.lora_A.default.weight \(.*\) is missing from",
    lost_dropout: "the dropout before mlp.down_proj.lora_A.default.weight is not the original's",
    changed_scaling: "is off by",
}


@pytest.mark.parametrize(("fault", "expected"), FAULTS.items(), ids=[f.__name__ for f in FAULTS])
def test_a_planted_fault_is_found(
    fault: Callable[[GraphModule], None], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(graph_module: GraphModule, context: Any) -> int:
        fault(graph_module)
        return 1

    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES, planted))
    _, report = verified("Llama", torch.bfloat16, 0.1)
    (mismatch,) = report.mismatches
    assert mismatch.startswith("LlamaDecoderLayer: ")
    assert not report.certificates
    assert report.fused == 0
    assert re.search(expected, mismatch), mismatch
    assert all(mismatch in (site.reason or "") for site in report.sites[:7])


def test_a_wrong_gradient_of_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.ATTENTION_BACKWARD

    def wrong(*args: Any) -> tuple[torch.Tensor, ...]:
        query, key, value = right(*args)
        return query * 1.05, key, value

    monkeypatch.setattr(attention, "ATTENTION_BACKWARD", wrong)
    monkeypatch.setattr(attention_pass, "expected", lambda *_: True)
    _, report = verified("Llama", torch.bfloat16)
    (mismatch,) = report.mismatches
    assert "gradient of query of attention (inputs: real) is off by" in mismatch


def test_a_wrong_decoder_is_found_in_both_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = QuantFormat.dequantize_rows

    def wrong(self: QuantFormat, *args: Any) -> torch.Tensor:
        return right(self, *args).mul_(1.01)

    monkeypatch.setattr(QuantFormat, "dequantize_rows", wrong)
    _, report = verified("Llama", torch.float32)
    assert report.mismatches


def test_strict_raises_and_names_block_tensor_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(graph_module: GraphModule, context: Any) -> int:
        one_per_cent(graph_module)
        return 1

    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES, planted))
    pattern = r"LlamaDecoderLayer: .* is off by 1\.\de-0\d of its norm, allowed \d\.\de-0\d"
    with pytest.raises(errors.VerificationError, match=pattern):
        verified("Llama", torch.float32, strict=True)


def test_verify_takes_no_other_word() -> None:
    with pytest.raises(errors.OptionError, match="verify='twice'"):
        qlora_compile.optimize(toy(), lora(), verify=cast(Any, "twice"))


def halved(x: torch.Tensor, refused: tuple[str, ...]) -> torch.Tensor:
    if str(x.dtype) in refused:
        raise RuntimeError(f"no kernel for {x.dtype}")
    return x / 2


@pytest.mark.parametrize(
    ("refused", "reference"),
    [
        ((), "float64"),
        (("torch.float64",), "float32; in float64 it does not run: no kernel for torch.float64"),
        (("torch.float64", "torch.float32"), "its own dtypes; in float64 it does not .*; in flo"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_a_reference_of_less_than_float64_says_so(
    refused: tuple[str, ...], reference: str, scale: float
) -> None:
    graphs = []
    for factor in (1.0, scale):
        graph = Graph()
        x = graph.placeholder("x")
        half = graph.call_function(halved, (x, refused if factor == 1.0 else ()))
        graph.output((graph.call_function(torch.mul, (half, factor)),))
        graphs.append(GraphModule(torch.nn.Module(), graph))
    x = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
    inputs = [CapturedInput("x", stored=False)]
    result = check(graphs[0], graphs[1], graphs[1].forward, inputs, [x])
    assert re.match(reference, result.reference)
    assert (result.mismatch is None) == (scale == 1.0)


@settings(max_examples=25)
@given(
    format=st.sampled_from(FORMATS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    double=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_reference_sees_through_packed_weights(
    format: QuantFormat, shape: tuple[int, int], double: bool, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    n, k = shape
    weight = torch.randn(n, k, dtype=torch.bfloat16)
    packed = format.quantize(weight, double_quantize=double and format.has_double_quantize)
    x = torch.randn(3, k, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(n, dtype=torch.float64, requires_grad=True) if has_bias else None
    call = Call(
        (LinearCall(packed.layout, has_bias),), torch.bfloat16, torch.bfloat16, torch.bfloat16
    )
    tensors = [p.double() if p.is_floating_point() else p for p in packed.tensors]
    tensors += [] if bias is None else [bias]
    (y,) = specified_linears(torch.float64, x, tensors, None, str(call))
    exact = format.dequantize(packed, torch.float32).double()
    expected = torch.nn.functional.linear(x, exact, bias)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-13)
    weights = torch.randn_like(y)
    leaves = [x] if bias is None else [x, bias]
    for one, other in zip(
        torch.autograd.grad(y, leaves, weights),
        torch.autograd.grad(expected, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-13)


@settings(max_examples=15)
@given(
    format=st.sampled_from(FORMATS),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    unserved=st.integers(0, 2),
    rank=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_the_reference_sees_through_packed_experts(
    format: QuantFormat, counts: list[int], unserved: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    experts, n, k = len(counts), 6, 10
    packed = format.quantize(torch.randn(experts * n, k))
    offsets = torch.tensor(counts).cumsum(0).int()
    x = torch.randn(sum(counts) + unserved, k, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(experts, n, dtype=torch.float64)
    factors: list[torch.Tensor] = []
    if rank:
        shapes = ((experts, rank, k), (experts, n, rank))
        factors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    a, b = factors or (None, None)
    linear = LinearCall(packed.layout, bias=True, rank=rank)
    call = Call((linear,), torch.bfloat16, torch.bfloat16, torch.bfloat16, experts=experts)
    adapter = [*factors, torch.tensor([1.5], dtype=torch.float64)] if rank else []
    tensors = [offsets, *packed.tensors, bias, *adapter]
    (y,) = specified_experts(torch.float64, x, tensors, None, str(call))
    weight = format.dequantize(packed, torch.float32).double().view(experts, n, k)
    expected = experts_reference(x, offsets, weight, bias, a, b, scaling=1.5)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-12)
    weights = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *factors], weights, allow_unused=True)
    for one, other in zip(
        found, torch.autograd.grad(expected, [x, *factors], weights), strict=True
    ):
        if one is None:  # no expert has a row
            assert not other.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-12)
