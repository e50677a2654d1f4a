"""The experts' op, by every variant, against the specification in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels.call import Call as FusedCall
from qlora_compile.kernels.call import LinearCall
from qlora_compile.kernels.experts import op
from qlora_compile.kernels.experts.base import ExpertsVariant
from qlora_compile.kernels.experts.op import QLORA_EXPERTS
from qlora_compile.kernels.experts.registry import EXPERTS_VARIANTS, ExpertsChoice
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.registry import FORMATS, UNQUANTIZED, format_named
from tests.examples import examples
from tests.format_options import fitting
from tests.kernels.experts_reference import experts_reference
from tests.kernels.linear_cases import double_quantizes

FACTOR = 1.5
"""An error may be this many times that of the plain computation in the same dtypes."""

SCALING = 1.5
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# What runs on the CPU; test_grouped_experts.py has the rest, in the interpreter.
by_variant = pytest.mark.parametrize(
    "variant", [v for v in EXPERTS_VARIANTS if v.name == "native"], ids=lambda v: v.name
)


@dataclass(frozen=True)
class Case:
    """counts: rows of each expert; tail: rows past them. x, y and products are in `dtype`, the
    adapter in `parameter`."""

    counts: tuple[int, ...] = (3, 0, 2)
    tail: int = 0
    n: int = 24
    k: int = 40
    rank: int = 3
    format: str = UNQUANTIZED
    block_size: int | str = 64
    double_quantize: bool = False
    dtype: torch.dtype = F32
    parameter: torch.dtype = F32
    bias: bool = True
    transposed: bool = False
    seed: int = 0

    def build(self) -> Call:
        generator = torch.Generator().manual_seed(self.seed)
        experts, rows = len(self.counts), sum(self.counts) + self.tail

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64).mul_(scale).to(dtype)

        weight = normal(experts, self.n, self.k, dtype=F32, scale=0.3)
        layout, planes = Layout(UNQUANTIZED, (experts * self.n, self.k)), [weight.to(self.dtype)]
        if self.transposed:
            planes = [planes[0].transpose(1, 2).contiguous().transpose(1, 2)]
        if self.format != UNQUANTIZED:
            packed = format_named(self.format).quantize(
                weight.view(-1, self.k),
                **fitting(self.format, self.block_size, self.double_quantize),
            )
            weight = format_named(self.format).dequantize(packed, F32).view_as(weight)
            planes, layout = packed.tensors, packed.layout
        leaves = {"x": normal(rows, self.k, dtype=self.dtype)}
        if self.rank:
            # Strided, as PEFT's factors come.
            a = normal(self.rank, experts, self.k, dtype=self.parameter, scale=self.k**-0.5)
            b = normal(self.n, self.rank, experts, dtype=self.parameter, scale=self.rank**-0.5)
            leaves |= {"lora_a": a.transpose(0, 1), "lora_b": b.permute(2, 0, 1)}
        return Call(
            case=self,
            leaves=leaves,
            offsets=torch.tensor(self.counts, dtype=torch.int32).cumsum(0, dtype=torch.int32),
            planes=planes,
            layout=layout,
            weight=weight.to(self.dtype),
            bias=normal(experts, self.n, dtype=self.dtype) if self.bias else None,
            grad=normal(rows, self.n, dtype=self.dtype),
        )


@dataclass(frozen=True)
class Call:
    case: Case
    leaves: dict[str, Tensor]
    offsets: Tensor
    planes: list[Tensor]
    layout: Layout
    weight: Tensor
    bias: Tensor | None
    grad: Tensor

    def arguments(self, leaves: dict[str, Tensor]) -> tuple[Any, ...]:
        case = self.case
        adapter = []
        if case.rank:
            scaling = torch.tensor([SCALING], dtype=torch.promote_types(F32, case.dtype))
            adapter = [leaves["lora_a"], leaves["lora_b"], scaling]
        bias = [] if self.bias is None else [self.bias]
        linear = LinearCall(self.layout, case.bias, case.rank)
        call = FusedCall((linear,), case.dtype, case.dtype, case.dtype, experts=len(case.counts))
        return leaves["x"], [self.offsets, *self.planes, *bias, *adapter], None, str(call)

    def fused(self, variant: ExpertsVariant, wanted: set[str] | None = None) -> dict[str, Tensor]:
        choice = ExpertsChoice(variant, 0.0)
        leaves = {
            name: leaf.detach().requires_grad_(wanted is None or name in wanted)
            for name, leaf in self.leaves.items()
        }
        with mock.patch.object(op, "choose", return_value=choice):
            (y,) = QLORA_EXPERTS(*self.arguments(leaves))
            return _results(y, leaves, self.grad)

    def reference(self, *, plain: bool = False, magnitudes: bool = False) -> dict[str, Tensor]:
        """Compute the reference in float64, or `plain` in the case's dtypes. magnitudes: of
        absolute values."""
        dtype = self.case.dtype if plain else F64

        def cast(tensor: Tensor) -> Tensor:
            return (tensor.abs() if magnitudes else tensor).to(dtype)

        leaves = {name: cast(leaf).requires_grad_() for name, leaf in self.leaves.items()}
        bias = None if self.bias is None else cast(self.bias)
        factors = (leaves.get("lora_a"), leaves.get("lora_b"))
        y = experts_reference(
            leaves["x"], self.offsets, cast(self.weight), bias, *factors, scaling=SCALING
        )
        return _results(y, leaves, cast(self.grad))


def _results(y: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    needed = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    results = {"y": y.detach()}
    if needed:
        grads = torch.autograd.grad(y, list(needed.values()), grad)
        results |= {f"grad {name}": g for name, g in zip(needed, grads, strict=True)}
    return results


def assert_no_worse_than_plain(call: Call, actual: dict[str, Tensor]) -> None:
    exact, plain = call.reference(), call.reference(plain=True)
    magnitudes = call.reference(magnitudes=True)
    eps = torch.finfo(call.case.dtype).eps
    for name, value in actual.items():
        dtype = call.leaves[name[5:]].dtype if name.startswith("grad") else call.case.dtype
        assert value.dtype == dtype, name
        assert value.shape == exact[name].shape, name
        error = float((value.double() - exact[name]).norm())
        plain_error = float((plain[name].double() - exact[name]).norm())
        # The last rounding is a matter of luck, and among few elements so is everything else; the
        # float64 reference is no more exact than what is held against it.
        rounding = float(exact[name].norm()) * eps / 2
        accumulation = 8 * torch.finfo(F64 if call.case.dtype == F64 else F32).eps
        # All of a row of an adapter's gradient share the rounding of one number.
        few = min(value.numel(), sum(call.case.counts) * (call.case.rank or value.numel()))
        luck = max(accumulation, eps / max(few, 1) ** 0.5)
        allowed = FACTOR * max(plain_error, rounding) + luck * float(magnitudes[name].norm())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    format = draw(st.sampled_from((UNQUANTIZED, *(each.name for each in FORMATS))))
    double = double_quantizes(format) and draw(st.booleans())
    dtype, parameter = draw(
        st.sampled_from(((F64, F64), (F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)))
    )
    return Case(
        counts=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))),
        tail=draw(st.integers(0, 3)),
        n=draw(st.integers(1, 40)),
        k=draw(st.integers(1, 70)),
        rank=draw(st.sampled_from((0, 1, 3, 16, 100))),
        format=format,
        block_size=draw(st.sampled_from((32, 64, 128, "row"))),
        double_quantize=double,
        dtype=dtype,
        parameter=parameter,
        bias=draw(st.booleans()),
        transposed=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@by_variant
@settings(max_examples=examples(100))
@given(case=cases())
def test_op_agrees_with_reference(variant: ExpertsVariant, case: Case) -> None:
    call = case.build()
    assert_no_worse_than_plain(call, call.fused(variant))


@by_variant
@pytest.mark.parametrize("counts", [(), (0, 0, 0), (0, 5), (4, 0, 0)])
def test_experts_without_rows(variant: ExpertsVariant, counts: tuple[int, ...]) -> None:
    call = Case(counts=counts or (0,), format="nf4", tail=0 if counts else 2).build()
    results = call.fused(variant)
    assert_no_worse_than_plain(call, results)
    for name in ("grad lora_a", "grad lora_b"):
        for expert, count in enumerate(call.case.counts):
            assert bool(results[name][expert].any()) == bool(count)


@by_variant
@pytest.mark.parametrize("wanted", [{"x"}, {"lora_a"}, {"lora_b"}, {"x", "lora_b"}, set()])
def test_gradients_are_those_asked_for(variant: ExpertsVariant, wanted: set[str]) -> None:
    call = Case(format="fp4").build()
    results = call.fused(variant, wanted)
    assert results.keys() == {"y"} | {f"grad {name}" for name in wanted}
    assert_no_worse_than_plain(call, results)


@by_variant
def test_every_expert_is_decoded_from_its_own_blocks(variant: ExpertsVariant) -> None:
    # Experts of 15 weights begin inside bytes and blocks of 32; one-hot rows read out W bit by bit.
    case = Case(counts=(5,) * 7, n=3, k=5, rank=0, format="nf4", block_size=32, bias=False)
    call = case.build()
    call.leaves["x"] = torch.eye(5).repeat(7, 1)
    y = call.fused(variant)["y"].view(7, 5, 3)
    assert torch.equal(y.transpose(1, 2), call.weight)


def test_saves_its_operands_only() -> None:
    call = Case(counts=(30, 20), n=64, k=96, format="nf4").build()
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in call.leaves.items()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x, tensors, *_ = arguments = call.arguments(leaves)
        QLORA_EXPERTS(*arguments)
    known = {tensor.data_ptr() for tensor in (x, *tensors)}
    assert {tensor.data_ptr() for tensor in saved} <= known
