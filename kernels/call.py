"""Call: what one fused op computes, as a value that crosses torch's dispatcher as text."""

from __future__ import annotations

import functools
import json
from dataclasses import astuple, dataclass

import torch

from qlora_compile.json_text import parsed_json
from qlora_compile.kernels.layout import Layout, OfLayout


@dataclass(frozen=True)
class NeedsGradient:
    """Which gradients a backward computes."""

    x: bool = False
    adapter: bool = False
    bias: bool = False


@dataclass(frozen=True)
class LinearCall(OfLayout):
    """One Linear of a Call: its weight's layout, whether it has a bias, the rank of its adapter (0
    without one), and the number that sets its dropout's stream apart from the other Linears'."""

    layout: Layout
    bias: bool = False
    rank: int = 0
    stream: int = 0


@dataclass(frozen=True)
class Call:
    """One fused op: y_i = x W_iᵀ + bias_i + scaling_i * drop(x) A_iᵀ B_iᵀ for Linears that share x.

    A single Linear is a group of one. The base product runs in `compute_dtype`, the adapter's in
    `lora_dtype`, y is returned in `out_dtype`. dropout: the probability of dropping an element of
    the adapters' input. save_low_rank: the forward also returns, and the backward is given,
    S = scaling / (1 - dropout) * drop(x) Aᵀ of all adapters. needs: the gradients a backward
    returns; a forward's Call has none. records: the name of the selector that chooses variants.
    experts: 0, or the number of experts whose weights [E, N, K] the single Linear's layout stores
    as [E * N, K]; rank is then each expert's.

    Scaling is a tensor and not part of a Call, so that a new value compiles nothing.
    """

    linears: tuple[LinearCall, ...]
    compute_dtype: torch.dtype
    lora_dtype: torch.dtype
    out_dtype: torch.dtype
    dropout: float = 0.0
    save_low_rank: bool = False
    needs: NeedsGradient = NeedsGradient()
    records: str = ""
    experts: int = 0

    @property
    def k(self) -> int:
        """Columns of x and of every weight."""
        return self.linears[0].k

    @property
    def columns(self) -> tuple[int, ...]:
        """N of each y."""
        return tuple(each.n // max(self.experts, 1) for each in self.linears)

    @property
    def rank(self) -> int:
        """The ranks of all adapters together: columns of S."""
        return sum(each.rank for each in self.linears)

    @functools.cached_property
    def text(self) -> str:
        """The Call as JSON, which `parse` reads back; equal Calls have equal texts."""
        fields = {name: getattr(self, name) for name in _PLAIN}
        fields |= {name: str(getattr(self, name)).removeprefix("torch.") for name in _DTYPES}
        fields["needs"] = astuple(self.needs)
        fields["linears"] = [(str(each.layout), *astuple(each)[1:]) for each in self.linears]
        return json.dumps(fields, separators=(",", ":"))

    def __str__(self) -> str:
        return self.text

    def __hash__(self) -> int:
        # A text keeps its hash; the hash of all fields would be computed in every look-up.
        return hash(self.text)

    @staticmethod
    @functools.cache
    def parse(text: str) -> Call:
        """Return the Call whose `text` this is."""
        fields = parsed_json(text)
        return Call(
            linears=tuple(
                LinearCall(Layout.parse(layout), *others) for layout, *others in fields["linears"]
            ),
            needs=NeedsGradient(*fields["needs"]),
            **{name: getattr(torch, fields[name]) for name in _DTYPES},
            **{name: fields[name] for name in _PLAIN},
        )


_DTYPES = ("compute_dtype", "lora_dtype", "out_dtype")
_PLAIN = ("dropout", "save_low_rank", "records", "experts")
