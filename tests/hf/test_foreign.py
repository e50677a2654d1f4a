"""Linears that only another library's code can read run as in stock PEFT, and are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

import qlora_compile
from qlora_compile.adapter_errors import NothingToPackError
from qlora_compile.errors import StrictError
from tests.test_equality import without_inductor

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")


class DecodedByFunction(Tensor):
    """Codes that `linear` decodes, as __torch_function__ sees it."""

    codes: Tensor
    scale: float

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is linear:
            x, weight, *bias = args
            return linear(x, weight.codes.to(x.dtype) * weight.scale, *bias)
        result: Any = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.detach:
            result.codes, result.scale = args[0].codes, args[0].scale
        return result


class Wrapper(Tensor):
    """Codes that every operator decodes, as __torch_dispatch__ sees it."""

    codes: Tensor
    scale: float

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: float) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        decoded = tree_map_only(Wrapper, lambda each: each.codes.float() * each.scale, args)
        return func(*decoded, **(kwargs or {}))


class Flattened(Wrapper):
    """A wrapper that torch.compile can take apart, as torchao's."""

    def __tensor_flatten__(self):
        return ["codes"], self.scale

    @staticmethod
    def __tensor_unflatten__(inner, scale, size, stride):
        return Flattened(inner["codes"], scale)


def codes_of(plain: nn.Linear) -> tuple[Tensor, float]:
    scale = plain.weight.abs().max().item() / 127
    return (plain.weight.data / scale).round().to(torch.int8), scale


def with_weight(make: Callable[[Tensor, float], Tensor]) -> Callable[[nn.Linear], nn.Module]:
    def replaced(plain: nn.Linear) -> nn.Module:
        plain.weight = nn.Parameter(make(*codes_of(plain)), requires_grad=False)
        return plain

    return replaced


def by_function(codes: Tensor, scale: float) -> Tensor:
    weight = torch.empty(codes.shape).as_subclass(DecodedByFunction)
    weight.codes, weight.scale = codes, scale
    return weight


class Fp8Linear(nn.Linear):
    """A Linear that multiplies with codes of its own, as transformers' for fine-grained FP8."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        codes = plain.weight.data.to(torch.float8_e4m3fn)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), plain.bias

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight.to(input.dtype), self.bias)


class Int8Linear(Fp8Linear):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain)
        self.weight = nn.Parameter(codes_of(plain)[0], requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight.to(input.dtype) * 0.01, self.bias)


class Coded(nn.Module):
    """A layer of GPTQ's kind: its codes are a buffer. sizes: the attributes that hold (K, N)."""

    sizes: tuple[str, ...] = ()
    qweight: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        for name, value in zip(self.sizes, (plain.in_features, plain.out_features), strict=False):
            setattr(self, name, value)
        codes, self.scale = codes_of(plain)
        self.register_buffer("qweight", codes)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.qweight.to(x.dtype) * self.scale, self.bias)


class HqqLayer(Coded):
    sizes = ("in_features", "out_features")


class GptqLayer(Coded):
    sizes = ("infeatures", "outfeatures")


class EetqLinear(Coded):
    """Tells no sizes."""


class CompressedLinear(nn.Linear):
    """An nn.Linear without a weight, as compressed-tensors'."""

    weight_packed: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        del self.weight
        codes, self.scale = codes_of(plain)
        self.register_buffer("weight_packed", codes)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight_packed.to(input.dtype) * self.scale)


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "DecodedByFunction": with_weight(by_function),
    "Wrapper": with_weight(Wrapper),
    "Flattened": with_weight(Flattened),
    "float8_e4m3fn": Fp8Linear,
    "int8": Int8Linear,
    **{each.__name__: each for each in (HqqLayer, GptqLayer, EetqLinear, CompressedLinear)},
}
"""By a word that the reason must say."""


class Block(nn.Module):
    def __init__(self, kind: str, *, mixed: bool) -> None:
        super().__init__()
        self.first = KINDS[kind](nn.Linear(64, 64))
        self.second = nn.Linear(64, 64) if mixed else KINDS[kind](nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def model_of(kind: str, *, mixed: bool, adapted: bool) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Block(kind, mixed=mixed)).requires_grad_(False)
    if not adapted:
        return model
    config = LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
    config._register_custom_module(dict.fromkeys((HqqLayer, GptqLayer), LoraLinear))
    return get_peft_model(model, config)


def step(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    y = model.train()(torch.randn(3, 64, requires_grad=True))
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | gradients


@pytest.mark.parametrize("mixed", [False, True], ids=("alone", "beside a plain Linear"))
@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_as_stock_and_is_named(kind: str, mixed: bool) -> None:
    adapted = kind not in ("EetqLinear", "CompressedLinear")
    expected = step(model_of(kind, mixed=mixed, adapted=adapted))
    model = qlora_compile.optimize(model_of(kind, mixed=mixed, adapted=adapted), tune="off")
    actual = step(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)
    sites = {site.name.rpartition(".")[2]: site for site in qlora_compile.explain(model).sites}
    assert sites.keys() == {"first", "second"}
    assert sites["second"].fused == mixed, sites["second"]
    assert kind in str(sites["first"].reason)
    assert (sites["first"].n, sites["first"].k) == ((0, 0) if kind == "EetqLinear" else (64, 64))
    assert sites["first"].rank == (4 if adapted else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_nothing_to_pack(kind: str) -> None:
    model = model_of(kind, mixed=False, adapted=False)
    modules = list(model.modules())
    with pytest.raises(NothingToPackError, match=kind):
        qlora_compile.optimize(model, quantize="nf4")
    with pytest.raises(StrictError, match=kind):
        qlora_compile.optimize(model, strict=True)
    assert list(model.modules()) == modules
    model = model_of(kind, mixed=True, adapted=False)
    report = qlora_compile.explain(qlora_compile.optimize(model, quantize="nf4", tune="off"))
    assert sorted(site.format == "nf4" for site in report.sites) == [False, True]
