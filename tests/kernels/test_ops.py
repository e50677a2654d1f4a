"""Every op that the package registers is well formed by torch's own check, with at most five
arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import qlora_compile.api  # noqa: F401  imports whatever registers an op
from qlora_compile.kernels.attention import ATTENTION_FORWARD, attention_call
from qlora_compile.kernels.call import Call, NeedsGradient
from qlora_compile.kernels.library import LIBRARY
from tests.kernels import test_attention as attention_cases
from tests.kernels import test_qlora_experts as experts_cases
from tests.kernels.test_qlora_linear import EXAMPLES, backward_arguments

UTILITIES = (
    *("test_schema", "test_autograd_registration", "test_faketensor"),
    *("test_aot_dispatch_static", "test_aot_dispatch_dynamic"),
)

PREFIX = f"{LIBRARY.ns}::"
OPS = {
    name.removeprefix(PREFIX)
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith(PREFIX)
}


def linears() -> Iterator[tuple[Any, ...]]:
    for case, keeps in itertools.product(EXAMPLES.values(), (False, True)):
        call, _ = case.build().leaves()
        yield call.arguments(keeps)


def linears_backward() -> Iterator[tuple[Any, ...]]:
    """Yield every choice of gradients, each once: there is none of a bias or an adapter that is
    not."""
    for case in EXAMPLES.values():
        call = case.build()
        adapter, bias = ([True, False] if there else [False] for there in (case.rank, case.bias))
        for needs in itertools.product([True, False], adapter, bias):
            for keeps in {False, case.rank > 0}:
                yield backward_arguments(call, NeedsGradient(*needs), keeps)


def experts(requires_grad: bool = True) -> Iterator[tuple[Any, ...]]:
    cases = experts_cases.Case
    for case in (cases(format="nf4", double_quantize=True), cases(transposed=True, bias=False)):
        call = case.build()
        leaves = {n: leaf.detach().requires_grad_(requires_grad) for n, leaf in call.leaves.items()}
        yield call.arguments(leaves)


def experts_backward() -> Iterator[tuple[Any, ...]]:
    for x, tensors, seed, text in experts(requires_grad=False):
        call = Call.parse(text)
        grad = torch.randn(x.shape[0], call.columns[0], dtype=call.out_dtype)
        for needs in itertools.product([True, False], repeat=2):
            yield [grad], x, tensors, seed, str(replace(call, needs=NeedsGradient(*needs)))


def attentions() -> Iterator[tuple[Any, ...]]:
    for mask in attention_cases.MASKS:
        operands, given_mask, _ = attention_cases.Case(2, 2, 2, 20, 30, 16, mask).operands(0)
        yield *operands, given_mask, attention_call(mask == "causal", None)


def attentions_forward() -> Iterator[tuple[Any, ...]]:
    for query, key, value, mask, text in attentions():
        if mask is None or mask.dtype != torch.bool:
            yield query, [key, value] if mask is None else [key, value, mask], None, text


def attentions_backward() -> Iterator[tuple[Any, ...]]:
    for query, tensors, _, text in attentions_forward():
        query, *tensors = (each.detach() for each in (query, *tensors))
        results = ATTENTION_FORWARD(query, tensors, None, text)
        yield [torch.randn_like(results[0])], query, [*tensors, *results], None, text


ARGUMENTS: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "qlora_linear": linears,
    "qlora_linear_backward": linears_backward,
    "qlora_experts": experts,
    "qlora_experts_backward": experts_backward,
    "attention": attentions,
    "attention_forward": attentions_forward,
    "attention_backward": attentions_backward,
}


def test_every_op_has_arguments_to_be_checked_with() -> None:
    assert ARGUMENTS.keys() == OPS


@pytest.mark.parametrize("name", sorted(OPS))
def test_op_is_well_formed(name: str) -> None:
    op = getattr(getattr(torch.ops, LIBRARY.ns), name).default
    assert len(op._schema.arguments) <= 5
    assert not op._schema.is_mutable
    for arguments in ARGUMENTS[name]():
        torch.library.opcheck(op, arguments, test_utils=UTILITIES)
