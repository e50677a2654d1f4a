"""The fused op, by every variant, against the specification in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels import op
from qlora_compile.kernels.call import NeedsGradient
from qlora_compile.kernels.op import QLORA_LINEAR, QLORA_LINEAR_BACKWARD, quantized_linear
from qlora_compile.kernels.problem import Direction, Problem
from qlora_compile.kernels.registry import FORMATS, UNQUANTIZED, VARIANTS, format_named
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.variants import dense, native_adapter, native_augmented
from qlora_compile.kernels.variants.base import Variant
from qlora_compile.kernels.variants.triton_variant import TritonVariant
from tests.examples import examples
from tests.kernels.group_cases import GroupCall, groups
from tests.kernels.linear_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    Call,
    Case,
    Dtypes,
    double_quantizes,
)

FACTOR = 1.5
"""A variant's error may be this many times that of the plain computation in the same dtypes."""

FORMAT_NAMES = (UNQUANTIZED, *(quant_format.name for quant_format in FORMATS))
NATIVE = [variant for variant in VARIANTS if not isinstance(variant, TritonVariant)]
"""The others run in tests/kernels/test_triton_variants.py."""
by_variant = pytest.mark.parametrize("variant", NATIVE, ids=lambda variant: variant.name)


@dataclass(frozen=True)
class Bound:
    exact: Tensor
    allowed: float
    dtype: torch.dtype

    def check(self, name: str, value: Tensor) -> None:
        assert value.dtype == self.dtype, name
        assert value.shape == self.exact.shape, name
        error = float((value.double() - self.exact).norm())
        assert error <= self.allowed, f"{name}: error {error:.2e}, allowed {self.allowed:.2e}"


def bounds(call: Call | GroupCall) -> dict[str, Bound]:
    """Return the error bounds of y and every gradient, from the plain computation."""
    exact, plain = call.reference(), call.reference(plain=True)
    magnitudes = call.reference(magnitudes=True)
    lowest = torch.finfo(call.case.dtypes.lowest).eps
    # In float64 the reference is no more exact than what is held against it.
    accumulation = 16 * lowest if call.case.dtypes.lowest == F64 else 4 * torch.finfo(F32).eps
    result = {}
    for name, value in plain.items():
        plain_error = float((value.double() - exact[name]).norm())
        # The last rounding and the order of a sum are a matter of luck, and among few elements so
        # is everything else.
        rounding = float(exact[name].norm()) * torch.finfo(value.dtype).eps / 2
        # All elements of an adapter's gradient share the roundings of [M, rank] products.
        drawn = value.numel()
        if name.startswith("grad lora"):
            drawn = min(drawn, math.prod(call.case.batch) * min(value.shape))
        luck = max(accumulation, lowest / max(drawn, 1) ** 0.5)
        allowed = FACTOR * max(plain_error, rounding) + luck * float(magnitudes[name].norm())
        result[name] = Bound(exact[name], allowed, value.dtype)
    return result


def assert_no_worse_than_plain(call: Call | GroupCall, actual: dict[str, Tensor]) -> None:
    expected = bounds(call)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        expected[name].check(name, value)


@st.composite
def cases(draw: st.DrawFn, format: str) -> Case:
    rows = draw(st.sampled_from([0, 1, 3, 17, 257, 600]))
    batch = draw(st.sampled_from([(rows,), (rows, 1), (1, 1, rows), (2, rows)]))
    return Case(
        batch=batch,
        n=draw(st.sampled_from([1, 2, 13, 64, 97])),
        k=draw(st.sampled_from([1, 7, 40, 64, 100, 129])),
        rank=draw(st.sampled_from([0, 1, 3, 16, 64, 100])),
        format=format,
        block_size=draw(st.sampled_from([32, 64, 256, "row"])),
        double_quantize=double_quantizes(format) and draw(st.booleans()),
        dtypes=draw(st.sampled_from(DTYPES)),
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from([None, None, 0.0, 0.1, 0.5])),
        scaling=draw(st.sampled_from([0.25, 1.0, 2.0])),
        contiguous=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@contextmanager
def small_blocks(data: st.DataObject) -> Iterator[None]:
    """Blocks of rows and weights that cut even the cases here."""
    rows = data.draw(st.sampled_from([native_adapter.ROW_BLOCK, 64]))
    weights = data.draw(st.sampled_from([dense.WEIGHT_BLOCKS, (256,)]))
    with (
        mock.patch.object(native_adapter, "ROW_BLOCK", rows),
        mock.patch.object(dense, "WEIGHT_BLOCKS", weights),
        mock.patch.object(native_augmented, "AUGMENTED_BLOCK", 512),
    ):
        yield


def drawn_configs(data: st.DataObject, variant: Variant, call: Call) -> dict[str, Any]:
    """Return a config for each direction, and whether S is kept."""
    keeps = data.draw(st.booleans())
    names: dict[str, Direction] = {"config": "forward", "backward_config": "backward"}
    problems = {
        name: replace(call.problem(direction), keeps_low_rank=keeps)
        for name, direction in names.items()
    }
    assume(not any(variant.rejects(problem) for problem in problems.values()))
    drawn = {n: data.draw(st.sampled_from(variant.configs(p))) for n, p in problems.items()}
    return {**drawn, "keeps": keeps}


@by_variant
@pytest.mark.parametrize("format", FORMAT_NAMES)
@settings(max_examples=examples(150, part=6))
@given(data=st.data())
def test_error_of_output_and_gradients(variant: Variant, format: str, data: st.DataObject) -> None:
    call = data.draw(cases(format)).build()
    with small_blocks(data):
        actual = call.fused(variant, **drawn_configs(data, variant, call))
    assert_no_worse_than_plain(call, actual)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: f"{dtypes.x}-{dtypes.lora}")
def test_the_bound_rejects_a_wrong_result(dtypes: Dtypes) -> None:
    call = Case((64,), n=48, k=64, dtypes=dtypes, dropout=0.1, bias=True).build()
    # The order of a sum makes up a few roundings where all of them are that small.
    units = 8 if dtypes.lowest in (BF16, F16) else 1000
    for name, bound in bounds(call).items():
        bound.check(name, bound.exact.to(bound.dtype))
        worse = bound.exact * (1 + units * torch.finfo(dtypes.lowest).eps)
        with pytest.raises(AssertionError, match=name):
            bound.check(name, worse.to(bound.dtype))


@by_variant
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("format", FORMAT_NAMES)
@settings(max_examples=8)
@given(data=st.data())
def test_one_hot_rows_give_the_decoded_weight(
    variant: Variant, format: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    drawn = data.draw(cases(format))
    dtypes = next(each for each in DTYPES if each.x == each.compute == each.lora == dtype)
    rank = 3 if variant.name == "augmented_native" else 0
    case = replace(drawn, batch=(drawn.k,), rank=rank, bias=False, dropout=None, dtypes=dtypes)
    call = replace(case.build(), x=torch.eye(case.k, dtype=dtype))
    if call.lora_b is not None:
        call = replace(call, lora_b=torch.zeros_like(call.lora_b))
    with small_blocks(data):
        results = call.fused(variant, **drawn_configs(data, variant, call))
    assert torch.equal(results["y"].t(), call.weight(dtype))

    back = replace(
        call, x=torch.zeros(case.n, case.k, dtype=dtype), grad=torch.eye(case.n).to(dtype)
    )
    with small_blocks(data):
        results = back.fused(variant, **drawn_configs(data, variant, back))
    assert torch.equal(results["grad x"], call.weight(dtype))


@by_variant
@pytest.mark.parametrize("format", FORMAT_NAMES)
@settings(max_examples=examples(100, part=6))
@given(data=st.data())
def test_error_of_siblings(variant: Variant, format: str, data: st.DataObject) -> None:
    call = data.draw(groups(data.draw(cases(format))))
    keeps = data.draw(st.booleans()) and call.problem("forward").rank > 0
    directions: tuple[Direction, ...] = ("forward", "backward")
    problems = [call.problem(direction, keeps) for direction in directions]
    with small_blocks(data):
        assume(not any(variant.rejects(problem) for problem in problems))
        forward, backward = (data.draw(st.sampled_from(variant.configs(p))) for p in problems)
        actual = call.fused(variant, forward, backward, keeps)
    assert_no_worse_than_plain(call, actual)


EXAMPLES = {
    "adapter": Case(),
    "dropout": Case(dropout=0.25, bias=True, batch=(2, 3)),
    "bfloat16": Case(dtypes=DTYPES[2], dropout=0.1, double_quantize=True),
    "base": Case(rank=0, bias=True, format="int8", block_size="row"),
    "unquantised": Case(format=UNQUANTIZED),
}
by_example = pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES.keys())


def backward_arguments(call: Call, needs: NeedsGradient, keeps: bool) -> tuple[Any, ...]:
    told = replace(call.fused_call(keeps), needs=needs)
    low_rank = [call.low_rank] if told.save_low_rank else []
    return [call.grad], call.x, [*call.tensors, *low_rank], call.seed, str(told)


def test_gradients_have_the_strides_the_fake_promises() -> None:
    call = Case(rank=4).build()
    assert call.lora_a is not None
    assert call.lora_b is not None
    transposed = replace(
        call,
        x=call.x.t().contiguous().t(),
        lora_a=call.lora_a.t().contiguous().t(),
        lora_b=call.lora_b.t().contiguous().t(),
    )
    arguments = backward_arguments(transposed, NeedsGradient(True, True), False)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(QLORA_LINEAR_BACKWARD, arguments, test_utils=utilities)


@by_variant
@pytest.mark.parametrize(
    "wanted",
    [
        (),
        ("x",),
        ("lora_a",),
        ("lora_b",),
        ("bias",),
        ("lora_a", "lora_b"),
        ("x", "bias"),
        ("x", "lora_b"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("dropout", [None, 0.3])
def test_gradients_of_what_is_trained(
    variant: Variant, wanted: tuple[str, ...], dropout: float | None
) -> None:
    call = Case((3, 7), bias=True, dropout=dropout).build()
    every = call.fused(variant)
    some = call.fused(variant, wanted)
    assert some.keys() == {"y", *(f"grad {name}" for name in wanted)}
    for name, value in some.items():
        # One product may yield several gradients, or fewer columns of them.
        torch.testing.assert_close(value, every[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_weight_is_not_decoded_for_the_adapters_gradients() -> None:
    call = Case().build()
    adapted, leaves = call.leaves(("lora_a",))
    (y,) = QLORA_LINEAR(*adapted.arguments())
    quant_format = format_named(call.case.format)
    with mock.patch.object(
        type(quant_format), "dequantize_rows", side_effect=AssertionError("decoded")
    ):
        y.backward(call.grad)
    assert leaves["lora_a"].grad is not None


@by_example
def test_autocast_around_the_op_changes_nothing(case: Case) -> None:
    call = case.build()
    outside = call.fused(VARIANTS[0])
    with torch.autocast("cpu", BF16):
        inside = call.fused(VARIANTS[0])
    assert inside.keys() == outside.keys()
    for name, value in outside.items():
        assert value.dtype == inside[name].dtype
        assert torch.equal(value, inside[name]), name


@pytest.mark.parametrize("x_dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("autocast", [None, BF16, F16], ids=str)
def test_quantized_linear_returns_the_dtype_of_linear(
    x_dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    call = Case(rank=0, bias=True).build()
    assert call.packed is not None
    assert call.bias is not None
    x, layout = call.x.to(x_dtype), str(call.packed.layout)
    weight, bias = call.weight(x_dtype), call.bias.to(x_dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        expected = torch.nn.functional.linear(x, weight, bias)
        y = quantized_linear(x, call.planes, bias, layout)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=8 * torch.finfo(y.dtype).eps, atol=0.05)


@by_variant
def test_an_expanded_gradient(variant: Variant) -> None:
    call = Case(bias=True, dropout=0.5).build()
    call = replace(call, grad=torch.ones(()).expand(call.grad.shape))
    assert_no_worse_than_plain(call, call.fused(variant))


def test_the_op_takes_the_selected_variant() -> None:
    call = Case().build()
    problems = []

    def spy(problem: Problem, records: str) -> Choice:
        problems.append(problem)
        return Choice(VARIANTS[0], VARIANTS[0].configs(problem)[0], 0.0)

    with mock.patch.object(op, "select", spy):
        call, _ = call.leaves(("x",))
        (y,) = QLORA_LINEAR(*call.arguments())
        y.backward(call.grad)
    forward, backward = problems
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert (forward.m, forward.n, forward.k, forward.rank) == (8, 24, 40, 3)
    assert replace(backward, direction="forward") == forward
