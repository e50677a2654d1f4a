"""Tapes: repeated calls on a CPU give the bits that computing anew gives."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels import op, registry
from qlora_compile.kernels.cpu import dropout, tapes
from qlora_compile.kernels.cpu.instructions import VARIABLE, levels
from qlora_compile.kernels.cpu.tape import Tape
from qlora_compile.kernels.plans.bits import same_bits
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.variants.base import NO_CONFIG, LinearGradients, LinearTensors
from tests.examples import examples
from tests.kernels.group_cases import GroupCall, groups
from tests.kernels.linear_cases import BF16, DTYPES, Case
from tests.kernels.test_qlora_linear import cases

USES = 4
"""Recorded at the second use, compared at the third."""


def entries() -> list[Any]:
    return list(tapes._state.entries.values())


def checked() -> list[bool]:
    return [isinstance(entry, Tape) and entry.checked for entry in entries()]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(found[name], value), name


@pytest.mark.parametrize("format", [registry.UNQUANTIZED, *(f.name for f in registry.FORMATS)])
@settings(max_examples=examples(40, 4))
@given(st.data())
def test_repeated_calls_give_the_bits_of_computed_ones(format: str, data: st.DataObject) -> None:
    """Whatever the tensors, which are others in each use, as other layers' are."""
    tapes.forget()
    case = data.draw(cases(format))
    group = data.draw(groups(case))
    problem = group.problem("forward")
    able = [v for v in registry.VARIANTS if not v.rejects(problem)]
    variant = data.draw(st.sampled_from(able))
    configs = [data.draw(st.sampled_from(list(variant.configs(group.problem(direction)))))
               for direction in ("forward", "backward")]  # fmt: skip
    keeps = data.draw(st.booleans())
    with ExitStack() as stack:
        level = data.draw(st.sampled_from(levels() or ("",)))
        stack.enter_context(mock.patch.dict("os.environ", {VARIABLE: level} if level else {}))
        for use in range(USES):
            others = type(group).of(
                *(replace(call.case, seed=call.case.seed + 7 * use) for call in group.calls)
            )
            found = others.fused(variant, configs[0], configs[1], keeps)
            with tapes.off():
                expected = others.fused(variant, configs[0], configs[1], keeps)
            assert_same(found, expected)
    if case.dropout is None and not variant.isolated and math.prod(case.batch):
        assert any(checked())


def linear(case: Case, seed: int = 0) -> dict[str, Tensor]:
    call, leaves = replace(case, seed=seed).build().leaves()
    y, *_ = op.QLORA_LINEAR(*call.arguments())
    grads = torch.autograd.grad(y, list(leaves.values()), call.grad)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


USUAL = Case(batch=(2, 64), n=48, k=64, rank=4, dtypes=DTYPES[2])


def expected(case: Case, seed: int) -> dict[str, Tensor]:
    with tapes.off():
        return linear(case, seed)


def used(case: Case = USUAL) -> None:
    for seed in range(USES):
        assert_same(linear(case, seed), expected(case, seed))


def test_another_key_has_a_tape_of_its_own() -> None:
    used()
    assert checked() == [True, True]
    changes = [
        replace(USUAL, batch=(2, 63)),
        replace(USUAL, contiguous=False),
        replace(USUAL, scaling=0.5),
        replace(USUAL, dtypes=DTYPES[1]),
    ]
    for number, case in enumerate(changes, start=1):
        used(case)
        assert checked() == [True] * (2 + 2 * number)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        used()
    finally:
        torch.set_num_threads(threads)
    assert len(checked()) == 4 + 2 * len(changes)
    wanted = [expected(USUAL, seed)["y"] for seed in range(USES)]
    with torch.inference_mode():
        for seed in range(USES):
            call = replace(USUAL, seed=seed).build()
            y, *_ = op.QLORA_LINEAR(*call.arguments())
            assert y.is_inference()
            assert same_bits(y, wanted[seed])
    assert len(checked()) == 5 + 2 * len(changes)


@pytest.mark.skipif(not dropout.is_built(), reason="this CPU has no AVX2, or no C++ compiler")
def test_dropout_is_repeated_with_new_seeds() -> None:
    """C++ reads the seed, so that a repetition draws another mask."""
    case = replace(USUAL, dropout=0.25)
    used(case)
    assert checked() == [True, True]
    assert not same_bits(linear(case, USES)["y"], linear(case, USES + 1)["y"])
    used(case)
    assert checked() == [True, True]


def test_a_changed_scaling_is_noticed() -> None:
    """Of the same tensor, in place."""
    call = USUAL.build()
    *_, scaling = tensors = call.tensors
    text = str(call.fused_call())
    before, *_ = [op.QLORA_LINEAR(call.x, tensors, None, text)[0] for _ in range(USES)]
    scaling.mul_(3)
    after = op.QLORA_LINEAR(call.x, tensors, None, text)[0]
    with tapes.off():
        assert same_bits(after, op.QLORA_LINEAR(call.x, tensors, None, text)[0])
    assert not torch.equal(after, before)


def test_another_choice_is_computed() -> None:
    call = USUAL.build()
    dense = next(each for each in registry.VARIANTS if each.name == "dense")
    standard, *others = dense.configs(call.problem("forward"))
    for config in (standard, *others):
        for _ in range(USES):
            found = call.fused(dense, config=config)
            with tapes.off():
                assert_same(found, call.fused(dense, config=config))
    assert len(checked()) == 2 * (1 + len(others))
    assert all(checked())


def test_autocast_changes_nothing() -> None:
    case = replace(USUAL, dtypes=DTYPES[1])
    wanted = [expected(case, seed) for seed in range(USES)]
    with torch.autocast("cpu", BF16):
        for seed in range(USES):
            assert_same(linear(case, seed), wanted[seed])
    assert checked() == [True, True]


def test_tensors_of_one_storage_are_told_apart() -> None:
    """x is the gradient, too; and the gradients of siblings are one number, expanded."""
    case = replace(USUAL, n=64, k=64)
    group = GroupCall.of(case, replace(case, seed=1))

    def gradients(use: int) -> list[Tensor]:
        x = (group.calls[0].x + use).requires_grad_()
        y = op.QLORA_LINEAR(x, group.calls[0].tensors, None, str(group.calls[0].fused_call()))[0]
        (own,) = torch.autograd.grad(y, x, x.detach())
        tensors = [each for call in group.calls for each in call.tensors]
        ys = op.QLORA_LINEAR(x, tensors, None, str(group.fused_call()))
        (expanded,) = torch.autograd.grad(ys[0].sum() + ys[1].sum(), x)
        return [own, expanded]

    for use in range(USES):
        found = gradients(use)
        with tapes.off():
            assert all(map(same_bits, found, gradients(use)))
    assert sum(checked()) == 3
    assert entries().count("refused") == 1


def test_results_are_the_callers_own() -> None:
    call = USUAL.build()
    results = [op.QLORA_LINEAR(*call.arguments())[0] for _ in range(USES + 2)]
    assert len({each.data_ptr() for each in results}) == len(results)
    first = results[-1].clone()
    results[-2].fill_(7.0)
    assert torch.equal(results[-1], first)
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in results)


def test_few_keys_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes, "MOST", 5)
    for rows in range(1, 21):
        op.QLORA_LINEAR(*replace(USUAL, batch=(rows,)).build().arguments())
    assert entries() == ["used once"] * 5
    used()
    for rows in (1, 2, 3):
        op.QLORA_LINEAR(*replace(USUAL, batch=(rows,)).build().arguments())
        linear(USUAL)
    assert len(entries()) == 5
    assert sum(checked()) == 2


def test_two_threads_repeat_at_once() -> None:
    used()
    wanted = [expected(USUAL, seed) for seed in range(8)]
    wrong: list[int] = []

    def work() -> None:
        for seed in (*range(8), *range(8)):
            found = linear(USUAL, seed)
            wrong.extend([seed] * (not all(same_bits(found[n], wanted[seed][n]) for n in found)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


Body = Callable[[LinearTensors], Tensor]


def toy(body: Body) -> Any:
    return mock.Mock(
        forward_group=lambda group, config: [body(group[0][0])],
        backward_group=lambda grads, group, needs, config: (None, [LinearGradients()]),
    )


def reading(tensors: LinearTensors) -> Tensor:
    return tensors.x.new_zeros(len(tensors.x), 48) + tensors.x[0, 0].item()


def drawing(tensors: LinearTensors) -> Tensor:
    return torch.mm(tensors.x, tensors.planes[0].t()).bernoulli_(0.5)


@pytest.mark.parametrize("body", [reading, drawing])
def test_what_cannot_be_repeated_is_computed(body: Body) -> None:
    case = replace(USUAL, rank=0, format=registry.UNQUANTIZED)
    choice = Choice(toy(body), NO_CONFIG, 0.0)
    with mock.patch.object(op, "select", return_value=choice):
        for seed in range(USES):
            call = replace(case, seed=seed).build()
            torch.manual_seed(seed)
            found = op.QLORA_LINEAR(*call.arguments())[0]
            torch.manual_seed(seed)
            with tapes.off():
                assert same_bits(found, op.QLORA_LINEAR(*call.arguments())[0])
    assert entries() == ["refused"]


def test_what_no_tape_sees_is_found_with_another_layers_tensors() -> None:
    def hidden(tensors: LinearTensors) -> Tensor:
        y = torch.empty(len(tensors.x), 48, dtype=tensors.x.dtype)
        y.numpy()[:] = tensors.x.numpy() @ tensors.planes[0].numpy().T
        return y

    case = replace(USUAL, rank=0, format=registry.UNQUANTIZED, dtypes=DTYPES[1])
    choice = Choice(toy(hidden), NO_CONFIG, 0.0)
    with mock.patch.object(op, "select", return_value=choice):
        for seed in range(USES):
            call = replace(case, seed=seed).build()
            wanted = call.x.flatten(0, -2) @ call.planes[0].t()
            if seed == 2:
                with pytest.warns(UserWarning, match=r"qlora_linear of \[2, 64, 64\].*other bits"):
                    y = op.QLORA_LINEAR(*call.arguments())[0]
            else:
                y = op.QLORA_LINEAR(*call.arguments())[0]
            torch.testing.assert_close(y.flatten(0, -2), wanted)
    assert entries() == ["refused"]


def test_some_calls_are_still_timed() -> None:
    """Otherwise nothing would find the records that real calls contradict."""
    timed: list[bool] = []

    def compute(*arguments: Any) -> list[Tensor]:
        from qlora_compile.kernels import call_times

        timed.append(call_times._current.chosen)
        return [arguments[0] * 2]

    choice = Choice(toy(reading), NO_CONFIG, 0.0)
    call = replace(USUAL, rank=0).build()
    count = 400
    for _ in range(count):
        tapes.repeated("qlora_linear", choice, compute, *call.arguments())
    assert timed[:3] == [False] * 3
    assert all(timed[3:])
    assert count / 24 < len(timed) - 3 < count / 11
