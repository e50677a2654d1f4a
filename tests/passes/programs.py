"""Modules that run drawn programs of what models do around, between and to their Linears."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from qlora_compile.kernels.registry import FORMATS, UNQUANTIZED
from qlora_compile.modules.linear import QuantizedLinear
from tests.format_options import fitting

WIDTHS = (8, 4)
STYLES = (
    *("plain", "scaling first", "branch first", "in place", "cloned"),
    *("leaky", "magnitude", "x written", "base without grad"),
)
"""How a site joins its adapter; the ways in the second line are not plain LoRA."""


class SiteSpec(NamedTuple):
    """A Linear [n, k] and its adapter. tied: to the site of that index, by its base weight ("base")
    or its A ("lora_a"), where the shapes allow it."""

    n: int = 8
    k: int = 8
    format: str = "none"
    bias: bool = False
    trained: bool = False
    rank: int = 0
    lora_bias: bool = False
    scaling: float = 2.0
    dropout: float = 0.0
    wide_adapter: bool = False
    style: str = "plain"
    tied: str = ""


class Site(nn.Module):
    """base_layer(x) + scaling * B(A(dropout(x))), as PEFT writes it."""

    def __init__(self, spec: SiteSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.scaling = spec, spec.scaling
        linear = nn.Linear(spec.k, spec.n, spec.bias, dtype=dtype).requires_grad_(spec.trained)
        if spec.format != "none" and not spec.trained:
            linear = QuantizedLinear.from_linear(linear, spec.format, **fitting(spec.format, 32))
        self.base_layer = linear
        if spec.rank:
            dtype = torch.float64 if spec.wide_adapter else dtype
            self.lora_dropout = nn.Dropout(spec.dropout)
            a = nn.Linear(spec.k, spec.rank, False, dtype=dtype)
            b = nn.Linear(spec.rank, spec.n, spec.lora_bias, dtype=dtype)
            self.lora_A, self.lora_B = nn.ModuleDict({"d": a}), nn.ModuleDict({"d": b})

    def tied_layer(self, tied: str) -> Any:
        if tied == "lora_a" and self.spec.rank:
            return self.lora_A["d"]
        return self.base_layer if tied == "base" else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad() if self.spec.style == "base without grad" else nullcontext():
            result = self.base_layer(x)
        if not self.spec.rank:
            return result
        if self.spec.style == "x written":
            x.mul_(0.5)
        dtype, style, scaling = result.dtype, self.spec.style, self.scaling
        if style == "cloned":
            result = result.clone()
        lora_a: Any = self.lora_A["d"]
        low = lora_a(self.lora_dropout(x.to(lora_a.weight.dtype)))
        branch = self.lora_B["d"](low)
        if style == "scaling first":
            result = result + scaling * branch
        elif style == "branch first":
            result = branch * scaling + result
        elif style == "in place" and result.dtype == branch.dtype:
            result += branch * scaling
        elif style == "magnitude":
            result = result + branch * scaling * self.base_layer.out_features
        elif style == "leaky":
            result = result + branch * scaling + low.sum()
        else:
            result = result + branch * scaling
        return result.to(dtype)


DTYPES = (torch.float32, torch.float64, torch.bfloat16)

Step = tuple[str, int, int, int]
"""An operation on two earlier values and a site, each by its index modulo how many there are."""


class Program(nn.Module):
    """Runs `steps` on x [rows, 8]; returns the values that `returned` names and x as it is left."""

    def __init__(
        self, sites: list[SiteSpec], steps: list[Step], returned: list[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.names = [f"s{i}" for i in range(len(sites))]
        for name, spec in zip(self.names, sites, strict=True):
            site = Site(spec, dtype)
            self._tie(site)
            self.add_module(name, site)
        self.steps, self.returned, self.dtype = steps, returned, dtype

    def _tie(self, site: Site) -> None:
        """Shares a parameter with the first site that has one of the same shape."""
        mine = site.tied_layer(site.spec.tied)
        other: Any
        for other in self.children():
            theirs = other.tied_layer(site.spec.tied)
            if type(mine) is type(theirs) is nn.Linear and (
                (mine.weight.shape, mine.weight.dtype) == (theirs.weight.shape, theirs.weight.dtype)
            ):
                mine.weight = theirs.weight
                return

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for operation, first, second, index in self.steps:
            site = getattr(self, self.names[index % len(self.names)])
            left = values[first % len(values)]
            values.append(OPERATIONS[operation](self, values, left, second, site))
        return (x, *(values[index % len(values)] for index in self.returned))


def _like(values: list[Tensor], value: Tensor, index: int) -> Tensor:
    """Return a value as wide as `value`, which is one."""
    same = [each for each in values if each.shape[1] == value.shape[1]]
    return same[index % len(same)]


def _wide(values: list[Tensor], width: int, index: int) -> Tensor:
    """Return a value `width` wide; halves and doubles one where there is none."""
    same = [each for each in values if each.shape[1] == width]
    if same:
        return same[index % len(same)]
    value = values[index % len(values)]
    return value[:, :width] if value.shape[1] > width else torch.cat([value, value], -1)


def linear(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return site(_wide(values, site.spec.k, second).to(m.dtype))


def siblings(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    """Return all sites that can read the same value; some programs write to it on the way."""
    x = _wide(values, site.spec.k, second).to(m.dtype)
    outputs = []
    for each in m.children():
        if each.spec.k == site.spec.k:
            outputs.append(each(x))
            if second == 7:
                x += 0.5
    values += outputs
    return torch.cat(outputs, 1)[:, : WIDTHS[0]].sum(1, keepdim=True) * left


def linear_no_grad(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    with torch.no_grad():
        return site(_wide(values, site.spec.k, second).to(m.dtype))


def linear_3d(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    x = _wide(values, site.spec.k, second).to(m.dtype)
    return site(x.view(2, x.shape[0] // 2, x.shape[1])).reshape(x.shape[0], site.spec.n)


def linear_onto(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    """Do h += linear(x), which writes to what other linears have read."""
    h = _wide(values, site.spec.n, second)
    h += site(_wide(values, site.spec.k, second + 1).to(m.dtype))
    return h


def add_onto(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    left += torch.sin(_like(values, left, second))
    return left


def write_method(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return left.mul_(0.5)


def write_slice(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    left[:, :2] = torch.sin(_like(values, left, second)[:, :2])
    return left


def write_function(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return functional.silu(left, inplace=True) if second % 2 else torch.relu_(left)


def write_dropout(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return functional.dropout(left, 0.0, True, True)


def residual(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return left + _like(values, left, second)


def gate(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return torch.sigmoid(left) * _like(values, left, second)


def cast(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return left.to((torch.bfloat16, torch.float32, torch.float64)[second % 3])


def cast_and_back(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    narrow = left.float() if second % 2 else left.bfloat16()
    return narrow.to(left.dtype)


def null_cast(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return left.to(left.dtype).contiguous()


def copied(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return left.clone() if second % 2 else left.detach()


def reshaped(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    rows, width = left.shape
    return left.reshape(2, rows // 2, width).transpose(0, 1).reshape(rows, width)


def transposed(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return left.t().contiguous().T


def expanded(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return left.sum(0, keepdim=True).expand(left.shape[0], left.shape[1])


def viewed(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return left.view(left.shape) if second % 2 else left[:, :]


def halved(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    return _wide(values, 8, second)[:, 4:]


def joined(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    half = _wide(values, 4, second)
    return torch.cat([half, torch.tanh(half)], dim=1)


def weight_read(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    """Return a base weight or an adapter's, where no linear reads it."""
    spec = site.spec
    if spec.rank and second % 2:
        return left + site.lora_A["d"].weight.mean().to(left.dtype)
    if isinstance(site.base_layer, QuantizedLinear):
        return left
    x = _wide(values, spec.k, second).to(m.dtype)
    if second % 4:
        return x @ site.base_layer.weight.T
    return functional.linear(x, site.base_layer.weight * 2.0)


def adapter_alone(m: Any, values: list[Tensor], left: Tensor, second: int, site: Any) -> Tensor:
    """Return the adapter's own product, next to or without its base."""
    if not site.spec.rank:
        return left
    weight = site.lora_A["d"].weight
    low = functional.linear(_wide(values, site.spec.k, second).to(weight.dtype), weight)
    return left + low.sum(1, keepdim=True).to(left.dtype)


_FREQUENT = (linear, linear, siblings, linear_onto, residual, cast)
_OTHERS: tuple[Callable[..., Tensor], ...] = (
    *(linear_no_grad, linear_3d, add_onto, write_method, write_slice, write_function),
    *(write_dropout, gate, cast_and_back, null_cast, copied, reshaped, transposed),
    *(expanded, viewed, halved, joined, weight_read, adapter_alone),
)
OPERATIONS = {each.__name__: each for each in (*_FREQUENT, *_OTHERS)}

_small = st.integers(0, 7)
site_specs = st.builds(
    SiteSpec,
    n=st.sampled_from(WIDTHS),
    k=st.sampled_from((8, 8, 4)),
    format=st.sampled_from((UNQUANTIZED, UNQUANTIZED, *(each.name for each in FORMATS))),
    bias=st.booleans(),
    trained=st.sampled_from((False,) * 7 + (True,)),
    rank=st.sampled_from((0, 1, 2, 3)),
    lora_bias=st.booleans(),
    scaling=st.sampled_from((2.0, 0.5, 1.0)),
    dropout=st.sampled_from((0.0, 0.0, 0.5)),
    wide_adapter=st.booleans(),
    style=st.sampled_from((*STYLES[:1] * 4, *STYLES)),
    tied=st.sampled_from(("", "", "", "base", "lora_a")),
)
steps = st.tuples(
    st.sampled_from([each.__name__ for each in (*_FREQUENT * 3, *_OTHERS)]), _small, _small, _small
)


def programs(*dtypes: torch.dtype) -> st.SearchStrategy[Program]:
    return st.builds(
        Program,
        sites=st.lists(site_specs, min_size=1, max_size=4),
        steps=st.lists(steps, min_size=1, max_size=9),
        returned=st.lists(_small, min_size=1, max_size=3),
        dtype=st.sampled_from(dtypes),
    )
