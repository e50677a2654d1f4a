"""Attention and its gradients against float64 are no worse than torch's own, by every level of
instructions that the processor has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels.attention import (
    ATTENTION,
    ATTENTION_FORWARD,
    TORCH_FORWARD,
    attention_call,
    expected,
)
from qlora_compile.kernels.cpu import attention as cpu_attention

pytestmark = pytest.mark.usefixtures("level")

CAUSAL = attention_call(True, None)

FACTOR = 1.1
"""As many times the error of torch's own is allowed, beside one rounding."""


def plain(
    operands: list[Tensor], mask: Tensor | None, *, is_causal: bool, scale: float | None = None
) -> Tensor:
    query, key, value = operands
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )


MASKS = (
    *("none", "causal", "rows", "one", "heads", "queries", "keys", "numbers", "wide numbers"),
    *("lowest", "a row of nothing"),
)


@dataclass(frozen=True)
class Case:
    batch: int
    groups: int
    shared: int
    queries: int
    keys: int
    width: int
    mask: str = "none"
    scale: float | None = None
    dtype: torch.dtype = torch.bfloat16

    def operands(self, seed: int) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """Return query, key and value, laid out like a model's projections, mask, and gradient."""
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: int, rows: int) -> Tensor:
            values = torch.randn(self.batch, rows, heads, self.width, generator=generator)
            return values.to(self.dtype).transpose(1, 2)

        heads = self.groups * self.shared
        sizes = ((heads, self.queries), (self.groups, self.keys), (self.groups, self.keys))
        operands = [normal(*size).requires_grad_() for size in sizes]
        b, m, n = self.batch, self.queries, self.keys
        shapes = {
            "rows": (m, n),
            "one": (1, 1, m, n),
            "heads": (b, heads, m, n),
            "queries": (b, 1, 1, n),
            "keys": (b, heads, m, 1),
            "numbers": (b, heads, m, n),
            "wide numbers": (m, n),
            "lowest": (b, 1, m, n),
            "a row of nothing": (b, 1, m, n),
        }
        mask = None
        if self.mask in shapes:
            mask = torch.rand(shapes[self.mask], generator=generator) < 0.8
            if self.mask in ("keys", "numbers", "wide numbers"):
                mask = torch.randn(shapes[self.mask], generator=generator)
                mask = mask if self.mask.startswith("wide") else mask.to(self.dtype)
            elif self.mask == "lowest":
                mask[..., 0] = True
                lowest = torch.finfo(self.dtype).min
                mask = torch.zeros(mask.shape).masked_fill(~mask, lowest).to(self.dtype)
            elif self.mask == "a row of nothing":
                mask[..., 0, :] = False
            else:
                mask[..., 0] = True
        return operands, mask, normal(heads, m)

    def gradients(self, operands: list[Tensor], mask: Tensor | None, grad: Tensor) -> list[Tensor]:
        y = plain(operands, mask, is_causal=self.mask == "causal", scale=self.scale)
        return list(torch.autograd.grad(y, operands, grad))


cases = st.builds(
    Case,
    *(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    *(st.integers(1, 300), st.integers(1, 300), st.integers(1, 90)),
    mask=st.sampled_from(MASKS),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16]),
)


EXAMPLES = (
    Case(2, 1, 3, 256, 256, 64, "causal"),
    Case(1, 1, 1, 257, 129, 33, "causal"),
    Case(1, 1, 1, 3, 290, 32, "causal"),
    Case(1, 1, 2, 40, 300, 128, "numbers"),
    Case(1, 1, 2, 140, 300, 128, "numbers"),
    Case(1, 1, 2, 40, 30, 16, "a row of nothing"),
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 1, 2, 40, 30, 16, "lowest"),
    Case(1, 1, 2, 40, 30, 16, "lowest", dtype=torch.float16),
)


def over_cases(test: Callable[[Case, int], None]) -> Callable[[], None]:
    """Run a test of a case and a seed for all examples and for drawn ones."""
    for case in EXAMPLES:
        test = example(case, 0)(test)
    return settings(max_examples=60)(given(cases, st.integers(0, 1 << 16))(test))


@over_cases
def test_gradients(case: Case, seed: int) -> None:
    operands, mask, grad = case.operands(seed)
    y = ATTENTION(*operands, mask, attention_call(case.mask == "causal", case.scale))
    actual = torch.autograd.grad(y, operands, grad)
    torchs = case.gradients(operands, mask, grad)
    wide = [each.detach().double().requires_grad_() for each in operands]
    wide_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = case.gradients(wide, wide_mask, grad.double())
    for name, own, theirs, true in zip(("q", "k", "v"), actual, torchs, exact, strict=True):
        # Where a single key counts, the gradients of q and k are zero, and what is computed noise.
        largest = torch.finfo(case.dtype).eps * (true.norm() + grad.double().norm() * 0.05)
        error = (own.double() - true).norm()
        assert error <= FACTOR * (theirs.double() - true).norm() + largest, name


@over_cases
def test_output_and_sums(case: Case, seed: int) -> None:
    operands, mask, _ = case.operands(seed)
    operands = [each.detach() for each in operands]
    causal = case.mask == "causal"
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=case.dtype).masked_fill(~mask, -math.inf)
    others = operands[1:] if mask is None else [*operands[1:], mask]
    text = attention_call(causal, case.scale)
    own, log_sum = ATTENTION_FORWARD(operands[0], others, None, text)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "scale": case.scale}
    theirs, their_log_sum = TORCH_FORWARD(*operands, 0.0, **options)
    assert (own.stride(), log_sum.stride()) == (theirs.stride(), their_log_sum.stride())
    assert own.dtype == theirs.dtype
    # Of scores that are sums of products of 16-bit numbers; torch rounds them otherwise.
    torch.testing.assert_close(log_sum, their_log_sum, rtol=1e-4, atol=1e-3)
    wide = [each.double() for each in operands]
    wide_mask = None if mask is None else mask.double()
    exact = plain(wide, wide_mask, is_causal=causal, scale=case.scale).nan_to_num()
    # One rounding of every probability, whose products may cancel out.
    terms = plain([*wide[:2], wide[2].abs()], wide_mask, is_causal=causal, scale=case.scale)
    rounding = torch.finfo(case.dtype).eps * terms.nan_to_num().norm()
    error = (own.double() - exact).norm()
    assert error <= FACTOR * (theirs.double() - exact).norm() + rounding


def test_our_attention_runs_where_it_is_expected(level: str) -> None:
    operands, _, _ = Case(2, 2, 2, 50, 50, 40).operands(0)
    assert cpu_attention.computes(*operands) == (level != "avx2")


def test_other_operands_are_torchs() -> None:
    operands = [torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3)]
    assert not expected(*operands)
    assert not expected(*(each.bfloat16().to("meta") for each in operands))
    grad = torch.randn(1, 2, 8, 16)
    own = torch.autograd.grad(ATTENTION(*operands, None, CAUSAL), operands, grad)
    theirs = torch.autograd.grad(plain(operands, None, is_causal=True), operands, grad)
    assert all(map(torch.equal, own, theirs))


def test_16_bits_are_widened_where_the_processor_has_no_instructions(level: str) -> None:
    operands, _, grad = Case(1, 2, 1, 70, 70, 48, dtype=torch.float16).operands(0)
    own = torch.autograd.grad(ATTENTION(*operands, None, CAUSAL), operands, grad)
    if not expected(*operands):
        assert level != "avx2"
        return
    wide = [each.detach().float().requires_grad_() for each in operands]
    theirs = torch.autograd.grad(plain(wide, None, is_causal=True), wide, grad.float())
    for each, true in zip(own, theirs, strict=True):
        assert (each - true).norm() <= 2 * torch.finfo(torch.float16).eps * true.norm()


def test_a_gradient_of_any_strides() -> None:
    operands, _, grad = Case(1, 2, 1, 70, 70, 48).operands(0)
    y = ATTENTION(*operands, None, attention_call(False, None))
    for strided in (grad.mT.contiguous().mT, grad[:, :1, :1, :1].expand(grad.shape)):
        actual = torch.autograd.grad(y, operands, strided, retain_graph=True)
        expected = torch.autograd.grad(y, operands, strided.clone(), retain_graph=True)
        assert all(map(torch.equal, actual, expected))


def test_not_a_number_stays_one() -> None:
    operands, _, grad = Case(1, 1, 1, 64, 64, 32).operands(0)
    with torch.no_grad():
        operands[0][0, 0, 40, 3] = torch.nan
    grads = torch.autograd.grad(
        ATTENTION(*operands, None, attention_call(False, None)), operands, grad
    )
    assert all(each.isnan().any() for each in grads)
    assert grads[0].isnan().any(-1).flatten().tolist() == [row == 40 for row in range(64)]
