"""Products of 16 bits are computed in float32 on CPUs without instructions for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._inductor import compile_fx
from torch.fx import GraphModule
from torch.nn import functional

import qlora_compile
from bench.coverage.kinds import KINDS, batch, built
from qlora_compile.kernels.cpu import instructions, slow_products
from qlora_compile.kernels.cpu.slow_products import is_looped
from qlora_compile.passes.wide_products import PRODUCTS, widen_products
from tests.examples import examples
from tests.test_equality import lora

HALVES = (torch.bfloat16, torch.float16)

Kind = tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]
FUNCTIONS: dict[str, Kind] = {
    "mm": (torch.matmul, ((5, 7), (7, 3))),
    "linear": (functional.linear, ((2, 5, 7), (3, 7), (3,))),
    "bmm": (torch.bmm, ((2, 5, 7), (2, 7, 3))),
    "baddbmm": (torch.baddbmm, ((2, 5, 3), (2, 5, 7), (2, 7, 3))),
    "einsum": (lambda x, y: torch.einsum("bij,bkj->bik", x, y), ((2, 5, 7), (2, 3, 7))),
    "convolution": (functional.conv1d, ((2, 4, 9), (6, 4, 3), (6,))),
    "by channel": (lambda x, w: functional.conv1d(x, w, groups=4), ((2, 4, 9), (4, 1, 3))),
}


@pytest.fixture
def without_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "level", lambda: "avx2")


def narrow_products(graph: GraphModule) -> list[str]:
    found = (node for node in graph.graph.nodes if node.target in PRODUCTS)
    return [n.name for n in found if any(v.dtype in HALVES for v in tensors(n.meta["val"]))]


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [each for each in value if each is not None]


@pytest.mark.usefixtures("without_16_bits")
@pytest.mark.parametrize("kind", FUNCTIONS)
@settings(max_examples=examples(20, 4))
@given(dtype=st.sampled_from(HALVES), seed=st.integers(0, 99), trained=st.integers(1, 7))
def test_forward_and_gradients(kind: str, dtype: torch.dtype, seed: int, trained: int) -> None:
    function, shapes = FUNCTIONS[kind]
    generator = torch.Generator().manual_seed(seed)
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    needs = [bool(trained >> n & 1) for n in range(len(shapes))]
    if not any(needs):
        needs[0] = True

    def run(make: Callable[..., Tensor], cast: torch.dtype) -> list[Tensor]:
        operands = [
            each.to(cast, copy=True).requires_grad_(need)
            for each, need in zip(given, needs, strict=True)
        ]
        result = make(*operands)
        result.backward(torch.linspace(-1, 1, result.numel()).view_as(result).to(dtype).to(cast))
        return [result.detach(), *(each.grad for each in operands if each.grad is not None)]

    widened: list[int] = []

    def compiled(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        widened.append(widen_products(gm, is_looped))
        gm.graph.lint()
        assert not narrow_products(gm)
        return gm.forward

    ours = run(aot_function(function, fw_compiler=compiled), dtype)
    assert widened[0] == 1
    for found, expected in zip(ours, run(function, torch.float64), strict=True):
        assert found.dtype == dtype
        # Every result is rounded once.
        error = (found.double() - expected).abs() - torch.finfo(dtype).eps * expected.abs()
        assert error.max() <= 2 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_widened_that_is_multiplied(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_products, "multiplies", lambda dtype: True)

    def compiled(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        assert widen_products(gm, is_looped) == 0
        return gm.forward

    x = torch.randn(5, 7).to(dtype)
    product = aot_function(torch.matmul, fw_compiler=compiled)(x, x.t())
    assert torch.equal(product, x @ x.t())


@pytest.mark.usefixtures("without_16_bits")
@pytest.mark.parametrize("name", ["mixtral", "mamba"])
def test_no_compiled_block_has_products_of_16_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, narrow = 0, []

    def compiled(graph: GraphModule, inputs: list[Any], **options: Any) -> Any:
        nonlocal count
        count += sum(node.target in PRODUCTS for node in graph.graph.nodes)
        narrow.extend(narrow_products(graph))
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compiled)
    model = built(KINDS[name]).bfloat16()
    inputs = batch(model)
    # PEFT adapts no output product of Mamba's.
    adapters = lora(target_modules=["in_proj", "q_proj"])
    model = qlora_compile.optimize(model, adapters, quantize="nf4").train()
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert count
    assert not narrow
