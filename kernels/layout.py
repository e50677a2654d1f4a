"""Layout: how a frozen weight is stored, as a value for graphs, files and records."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_compile.errors import LayoutTextError, LayoutVersionError

UNQUANTIZED = "none"
"""Format name of a weight kept in its own floating-point dtype."""

_TEXT = re.compile(r"(?P<format>\w+)\[(?P<rows>\d+)x(?P<columns>\d+)\](?P<parameters>( \w+=\w+)*)")
_VERSION = 1


def _number(text: str) -> int | str:
    """Return the whole number that `text` stands for, else `text` itself."""
    return int(text) if text.isdecimal() else text


def slices(size: int, step: int) -> list[slice]:
    """Return slices of 0 … `size` in runs of `step`, the last of which may be shorter."""
    step = max(step, 1)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class OfLayout:
    """A value with the `layout` of one weight, and so with its shape."""

    layout: Layout

    @property
    def n(self) -> int:
        """Rows of the weight: columns of y."""
        return self.layout.shape[0]

    @property
    def k(self) -> int:
        """Columns of the weight and of x."""
        return self.layout.shape[1]


@dataclass(frozen=True)
class Plane:
    """One tensor of a stored weight: its name among the others, its dtype and its shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """All that is known of a stored weight, except its tensors.

    format: the name of a QuantFormat, or "none" for a weight kept in its own floating-point dtype.
    shape: the logical [N, K]; weights of experts [E, N, K] are stored as [E * N, K].
    parameters: the options of the format, such as a block size, as sorted pairs of a name and a
    whole number or a word. The format checks them and derives the planes from them.
    """

    format: str
    shape: tuple[int, int]
    parameters: tuple[tuple[str, int | str], ...] = ()

    @classmethod
    def of(cls, format: str, shape: tuple[int, int], **parameters: int | str) -> Layout:
        """Return the Layout with `parameters`, given by name."""
        return cls(format, shape, tuple(sorted(parameters.items())))

    @property
    def quantized(self) -> bool:
        """Whether a QuantFormat stores the weight."""
        return self.format != UNQUANTIZED

    @functools.cached_property
    def named(self) -> Mapping[str, Any]:
        """The parameters by name."""
        return dict(self.parameters)

    def with_rows(self, rows: int) -> Layout:
        """Return the Layout of a weight with so many rows, stored in the same way."""
        return replace(self, shape=(rows, self.shape[1]))

    def __str__(self) -> str:
        """Return text such as "nf4[576x1536] block_size=64 double_quantize=1", for `parse`."""
        rows, columns = self.shape
        listed = "".join(f" {name}={value}" for name, value in self.parameters)
        return f"{self.format}[{rows}x{columns}]{listed}"

    @staticmethod
    @functools.cache
    def parse(text: str) -> Layout:
        """Return the Layout whose `str` is `text`. Raises LayoutTextError."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise LayoutTextError(value=text)
        pairs = (pair.split("=") for pair in found["parameters"].split())
        parameters = tuple((name, _number(value)) for name, value in pairs)
        return Layout(found["format"], (int(found["rows"]), int(found["columns"])), parameters)

    def to_tensor(self) -> Tensor:
        """Return a version and the text as uint8, because module state and safetensors hold only
        tensors; `from_tensor` reads it back."""
        return torch.tensor([_VERSION, *str(self).encode()], dtype=torch.uint8, device="cpu")

    @staticmethod
    def from_tensor(stored: Tensor) -> Layout:
        """Read what `to_tensor` has written. Raises LayoutVersionError and LayoutTextError."""
        version, *text = stored.tolist() or [0]
        if version != _VERSION:
            raise LayoutVersionError(value=version, known=_VERSION)
        return Layout.parse(bytes(text).decode(errors="replace"))
