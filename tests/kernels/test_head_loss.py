"""The chunked loss of an output head against torch's cross_entropy over all logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.allocations import allocations
from qlora_compile.errors import LabelRangeError, OptionError
from qlora_compile.kernels.head_loss import chunked_cross_entropy
from qlora_compile.kernels.head_sweep import Sweep
from qlora_compile.kernels.registry import FORMATS, UNQUANTIZED
from tests.examples import examples
from tests.kernels.head_cases import BF16, F32, F64, PRECISIONS, Case

FACTOR = 1.5
"""Ours may err this many times as much as the plain computation in the same dtypes, plus a part of
what one rounding of every product does."""
FLOORS = {F64: 2.0 + FACTOR, F32: 1.0, BF16: 0.5}
"""That part; float32's is twice what was seen, and bfloat16's what two roundings of a single number
come to, where the gradient is written in place and rounded again when it is scaled. In float64
nothing more precise is at hand: the plain computation is the reference too and errs by about one
such rounding, which its distance from itself does not show."""


def check(case: Case) -> None:
    call = case.build()
    ours, plain, exact = call.chunked(), call.plain(), call.plain(F64)
    magnitudes = call.magnitudes()
    if case.reduction == "mean" and bool((call.labels == -100).all()):
        assert ours.pop("loss").isnan()
        assert plain["loss"].isnan()
        assert all(not grad.any() for grad in ours.values())
        return
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype, name
        error = (value.double() - exact[name]).norm()
        allowed = FACTOR * (plain[name].double() - exact[name]).norm()
        # A sum continued from chunk to chunk is rounded after each: a random walk of their number.
        steps = math.ceil(case.vocabulary / (case.vocabulary_chunk or case.vocabulary)) ** 0.5
        floor = FLOORS[case.precision.lowest] * case.precision.eps * magnitudes[name].norm() * steps
        assert error <= allowed + floor, (name, error, allowed, floor)


def cases() -> st.SearchStrategy[Case]:
    size = st.integers(1, 40)
    return st.builds(
        Case,
        rows=size,
        vocabulary=st.integers(1, 90),
        width=size,
        rank=st.sampled_from([0, 1, 3]),
        bias=st.booleans(),
        format=st.sampled_from([UNQUANTIZED, *(each.name for each in FORMATS)]),
        precision=st.sampled_from(PRECISIONS),
        ignored=st.sampled_from([0.0, 0.3, 1.0]),
        softcap=st.sampled_from([None, 1.5, 30.0]),
        logit_scale=st.sampled_from([1.0, 0.25, 3.0]),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        reduction=st.sampled_from(["mean", "sum"]),
        chunk=st.none() | st.integers(1, 45),
        vocabulary_chunk=st.none() | st.integers(1, 95),
        seed=st.integers(0, 1 << 16),
    )


@settings(max_examples=examples(80))
@given(cases())
@example(Case(ignored=1.0))
@example(Case(ignored=1.0, label_smoothing=0.1, vocabulary_chunk=5))
@example(Case(vocabulary=1))
@example(Case(rank=3, bias=True, format="nf4", precision=PRECISIONS[2], vocabulary_chunk=8))
@example(Case(rank=3, bias=True, precision=PRECISIONS[4], softcap=1.5, chunk=2))
def test_equals_cross_entropy_over_all_logits(case: Case) -> None:
    check(case)


@settings(max_examples=examples(60))
@given(
    st.builds(
        Case,
        rows=st.integers(1, 40),
        vocabulary=st.integers(1, 300),
        width=st.integers(1, 40),
        precision=st.just(PRECISIONS[2]),
        ignored=st.sampled_from([0.0, 0.3, 1.0]),
        logit_scale=st.sampled_from([1.0, 0.25, 3.0]),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        reduction=st.sampled_from(["mean", "sum"]),
        chunk=st.none() | st.integers(1, 45),
        seed=st.integers(0, 1 << 16),
    )
)
def test_logits_that_become_their_gradient_in_place(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_no_number_is_not_hidden(value: float) -> None:
    hidden = torch.ones(2, 4, dtype=BF16, requires_grad=True)
    weight = torch.ones(40, 4, dtype=BF16)
    weight[17, 1] = value
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([3, 4]))
    loss.backward()
    assert not loss.isfinite()
    assert hidden.grad is not None
    assert not hidden.grad.isfinite().any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "lora_a", "lora_b"])
def test_only_what_requires_a_gradient_gets_one(frozen: str) -> None:
    call = Case(rank=3, bias=True).build()
    leaves = call.leaves()
    leaves[frozen].requires_grad_(False)
    loss = chunked_cross_entropy(labels=call.labels, scaling=1.5, **leaves)
    loss.backward()
    assert leaves[frozen].grad is None
    assert all(leaf.grad is not None for name, leaf in leaves.items() if name != frozen)


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Sweep, "_differentiate")
    call = Case(vocabulary_chunk=5).build()
    leaves = call.leaves()
    with torch.no_grad():
        loss = chunked_cross_entropy(labels=call.labels, **leaves)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(call.plain()["loss"]), rel=1e-5)


def test_other_ignored_labels() -> None:
    call = Case(rows=5, ignored=0.0).build()
    labels = torch.tensor([0, 3, 0, 2, 1])
    leaves = call.leaves()
    loss = chunked_cross_entropy(labels=labels, ignore_index=0, **leaves)
    expected = cross_entropy(call.logits(leaves), labels, ignore_index=0)
    torch.testing.assert_close(loss, expected)


def test_no_rows() -> None:
    hidden = torch.ones(0, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = chunked_cross_entropy(hidden, torch.ones(3, 4), labels, reduction="sum")
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("label", [-1, 19])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    call = Case().build()
    call.labels[2] = label
    with pytest.raises(LabelRangeError, match=f"label {label} is out of range; labels are from 0"):
        call.chunked()


def test_an_unknown_reduction_is_refused() -> None:
    bad: Any = "none"
    with pytest.raises(OptionError, match="reduction='none'"):
        chunked_cross_entropy(
            torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64), reduction=bad
        )


@pytest.mark.parametrize(
    ("rows", "vocabulary", "precision", "format", "softcap"),
    [
        (1024, 32768, 1, UNQUANTIZED, None),
        (1024, 32768, 1, "nf4", 30.0),
        (1024, 32768, 3, UNQUANTIZED, 30.0),
        (1024, 32768, 3, UNQUANTIZED, None),
        (512, 131072, 4, UNQUANTIZED, None),
    ],
)
def test_memory_at_a_large_vocabulary(
    rows: int, vocabulary: int, precision: int, format: str, softcap: float | None
) -> None:
    """At most a fifth of the plain computation's peak, forward and backward."""
    d = PRECISIONS[precision]
    case = Case(rows, vocabulary, 32, format=format, precision=d, softcap=softcap)
    call = case.build()
    hidden = call.tensors["hidden"]

    def step(chunked: bool) -> Tensor:
        leaf = hidden.detach().requires_grad_()
        weight = call.packed or call.tensors["weight"]
        with torch.autocast("cpu", torch.bfloat16, enabled=d.autocast):
            if chunked:
                loss = chunked_cross_entropy(leaf, weight, call.labels, softcap=softcap)
            else:
                logits = call.logits(call.tensors | {"hidden": leaf})
                loss = cross_entropy(logits.float(), call.labels)
        loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    ours, plain = (allocations(lambda c=chunked: step(c)).most for chunked in (True, False))
    assert ours <= 0.2 * plain, f"{ours / plain:.3f} of {plain}"
