"""QuantFormat: how a frozen [N, K] weight is stored and read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from qlora_compile.errors import BlockSizeError, PackedWeightError, RowRangeError, WeightShapeError
from qlora_compile.kernels.formats.options import DOUBLE, Option, checked
from qlora_compile.kernels.layout import Layout, Plane, slices
from qlora_compile.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from qlora_compile.kernels.gpu.decoders import Decoder, Side

BlockSize = int | Literal["row"]
"""How many weights of a row-major run share a scale; "row" for those of one row."""

USUAL_BLOCK_SIZE = 64
SMALLEST_BLOCK_SIZE = 32
LARGEST_BLOCK_SIZE = 4096


class QuantFormat(ABC):
    """One storage format of a frozen weight; without state, its parameters are in a Layout.

    A format declares its planes, the tensors in which it stores a weight. Only the format knows
    what they mean; the rest of the package passes them on in the declared order. The first plane
    holds the codes, `bits` for each weight, in the row-major order of the weight.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    options: ClassVar[tuple[Option, ...]] = ()
    """The values of the options that may be chosen for a weight."""

    @property
    def has_double_quantize(self) -> bool:
        """Whether `double_quantize` may be asked for."""
        return any(option.name == DOUBLE for option in self.options)

    def layout(self, shape: tuple[int, int], **options: Any) -> Layout:
        """Return the Layout of a weight of `shape` with these `options`, the others at their
        defaults.

        A false `double_quantize` may be given to every format. Raises FormatOptionError for a name
        that is no option, and what an Option raises for its value.
        """
        return self._layout(shape, **self._chosen(options, stored=True))

    def _chosen(self, options: Mapping[str, Any], *, stored: bool) -> dict[str, Any]:
        """Return all options that are stored in a Layout, or all that are not."""
        chosen = checked(self.name, self.options, options)
        return {each.name: chosen[each.name] for each in self.options if each.stored == stored}

    @abstractmethod
    def _layout(self, shape: tuple[int, int], **options: Any) -> Layout:
        """Return `layout`, given every option that a Layout stores, checked."""

    def usual_layout(self, shape: tuple[int, int], **options: Any) -> Layout:
        """Return the Layout that `optimize` uses if only these `options` are given."""
        return self.layout(shape, **({DOUBLE: self.has_double_quantize} | options))

    @abstractmethod
    def planes(self, layout: Layout) -> tuple[Plane, ...]:
        """Return the tensors that a weight of `layout` is stored in, the codes first."""

    def packed(self, layout: Layout, tensors: Sequence[Tensor]) -> PackedWeight:
        """Return the weight stored in `tensors`, in the order of `planes`. Raises
        PackedWeightError."""
        return PackedWeight.checked(layout, self.planes(layout), tensors)

    def quantize(self, weight: Tensor, *, site: str = "weight", **options: Any) -> PackedWeight:
        """Pack `weight` by these `options`, as `pack` with their Layout."""
        _check_weight(weight, site)
        rows, columns = weight.shape
        layout = self.layout((rows, columns), **options)
        return self.pack(weight, layout, site, **self._chosen(options, stored=False))

    def pack(
        self, weight: Tensor, layout: Layout, site: str = "weight", **options: Any
    ) -> PackedWeight:
        """Quantise `weight`, [N, K] of any floating-point dtype and strides, N, K >= 1, on its own
        device. site: the name that errors give. options: those that no Layout stores.

        Raises WeightShapeError, WeightValueError (NaN or infinity), and what a format raises for
        values that it cannot store.
        """
        _check_weight(weight, site)
        with torch.no_grad():
            encoded = self._encoded(
                weight.detach(), layout, site, **self._chosen(options, stored=False)
            )
            return self.packed(layout, encoded)

    @abstractmethod
    def _encoded(self, weight: Tensor, layout: Layout, site: str, **options: Any) -> list[Tensor]:
        """Return the planes of `weight`, each with storage of its own. options: those that no
        Layout stores."""

    def stacked(self, weights: Sequence[PackedWeight]) -> PackedWeight:
        """Return the weight [N1 + N2 + …, K] of `weights`, [N1, K], [N2, K], …, one below another.

        No value changes. Raises PackedWeightError if the weights differ in anything but their rows,
        or cannot be put together as they are stored.
        """
        first = weights[0].layout
        rows = sum(weight.shape[0] for weight in weights)
        for weight in weights:
            if weight.layout != first.with_rows(weight.shape[0]):
                problem = f"cannot stand above one of {weight.layout}"
                raise PackedWeightError(format=self.name, shape=first.shape, problem=problem)
        return self._stacked(first.with_rows(rows), weights)

    def _stacked(self, layout: Layout, weights: Sequence[PackedWeight]) -> PackedWeight:
        """Return `stacked` of weights that are stored alike.

        Here each row has a part of a plane, or one plane, such as an order of columns, serves all
        rows and must be the same for all weights.
        """
        planes = []
        for plane, own in zip(self.planes(layout), self.planes(weights[0].layout), strict=True):
            parts = [weight.planes[plane.name] for weight in weights]
            if own.shape != plane.shape:
                whole = torch.cat([part.reshape(-1, *plane.shape[1:]) for part in parts])
            elif all(torch.equal(part, parts[0]) for part in parts):
                whole = parts[0]
            else:
                problem = f"its {plane.name} is not that of the weight below"
                raise PackedWeightError(format=self.name, shape=own.shape, problem=problem)
            planes.append(whole)
        return self.packed(layout, planes)

    @abstractmethod
    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """Return the weight as [N, K] of `dtype`; this is the specification of the format.

        Every value is computed in float32 and then rounded once to `dtype`. Raises
        PackedWeightError if `packed` is of another format.
        """

    def dequantize_rows(
        self,
        packed: PackedWeight,
        start: int,
        stop: int,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return rows `start` … `stop` of the weight: [stop - start, K] of `dtype`, written to
        `out`.

        Equal bit for bit to `dequantize(packed, dtype)[start:stop]`. `out`: contiguous, of that
        shape and dtype, on the weight's device; made when None. Raises RowRangeError unless
        0 <= start <= stop <= N and start is a multiple of `row_alignment(packed.layout)`, and
        PackedWeightError if `packed` is of another format.
        """
        self.check_format(packed)
        rows, columns = packed.shape
        alignment = self.row_alignment(packed.layout)
        if not 0 <= start <= stop <= rows or start % alignment:
            raise RowRangeError(start=start, stop=stop, rows=rows, alignment=alignment)
        if out is None:
            out = torch.empty(stop - start, columns, dtype=dtype, device=packed.codes.device)
        with torch.no_grad():
            self._write_rows(packed, start, stop, out)
        return out

    @abstractmethod
    def _write_rows(self, packed: PackedWeight, start: int, stop: int, out: Tensor) -> None:
        """Do as `dequantize_rows`, to `out`, with checked arguments."""

    def decoded(
        self,
        packed: PackedWeight,
        dtype: torch.dtype,
        rows: int,
        memory: Callable[[int], Tensor | None] = lambda rows: None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield pairs (n, W[n] in `dtype`) that go through the weight once, about `rows` rows at a
        time. memory: what the rows are decoded to, None for fresh memory."""
        total, alignment = packed.shape[0], self.row_alignment(packed.layout)
        step = total if rows >= total else max(rows // alignment, 1) * alignment
        for n in slices(total, step):
            out = memory(n.stop - n.start)
            yield n, self.dequantize_rows(packed, n.start, n.stop, dtype, out)

    @abstractmethod
    def row_alignment(self, layout: Layout) -> int:
        """Return the least r >= 1 such that decoding may begin at every r-th row."""

    def check_format(self, packed: PackedWeight) -> None:
        """Raise PackedWeightError if `packed` is of another format."""
        if packed.format != self.name:
            problem = f"cannot be read as {self.name!r}"
            raise PackedWeightError(format=packed.format, shape=packed.shape, problem=problem)

    def label(self, layout: Layout) -> str:
        """Return a readable name of the format with its parameters."""
        return " ".join([self.name, *(f"{name} {value}" for name, value in layout.parameters)])

    def bytes_per_weight(self, layout: Layout) -> float:
        """Return how many bytes a product reads for each weight, for cost models."""
        sizes = (plane.dtype.itemsize * _count(plane) for plane in self.planes(layout))
        return sum(sizes) / (layout.shape[0] * layout.shape[1])

    @abstractmethod
    def device_decoders(self) -> tuple[Decoder, ...]:
        """Return the ways in which Triton kernels may decode it, first the one that runs on every
        target. Imports Triton."""

    def device_tables(self, device: torch.device) -> Tensor | None:
        """Return what a GPU's decoders read besides the packed weight: float32 on `device`, shared,
        and made on first use."""
        return None

    @abstractmethod
    def device_side(self, layout: Layout, tensors: Sequence[Tensor], tile_columns: int) -> Side:
        """Return what the decoders read of the planes `tensors` beside the codes, for tiles with so
        many columns of W. Imports Triton."""

    def prepared(
        self, layout: Layout, tensors: Sequence[Tensor]
    ) -> tuple[Layout, Sequence[Tensor]]:
        """Return the Layout and the planes of the same weight in a form that decodes faster, for
        kernels that read each plane many times; computed on the device if the format has such a
        form."""
        return layout, tensors

    def device_obstacle(self, layout: Layout) -> str | None:
        """Return why no Triton kernel can decode a weight of `layout`; None if the decoders can."""
        return None


def _count(plane: Plane) -> int:
    return torch.Size(plane.shape).numel()


def _check_weight(weight: Tensor, site: str) -> None:
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise WeightShapeError(site=site, value=f"{weight.dtype} {list(weight.shape)}")


def checked_block_size(block_size: object) -> int:
    """Return `block_size`, if it is a power of two that is allowed. Raises BlockSizeError."""
    problem = None
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        problem = "is not an integer"
    elif block_size < SMALLEST_BLOCK_SIZE or block_size > LARGEST_BLOCK_SIZE:
        problem = "is out of range"
    elif block_size & (block_size - 1):
        problem = "is not a power of two"
    if problem is None:
        assert isinstance(block_size, int)
        return block_size
    raise BlockSizeError(
        value=block_size,
        problem=problem,
        smallest=SMALLEST_BLOCK_SIZE,
        largest=LARGEST_BLOCK_SIZE,
        extra=", or 'row' for one absmax per row",
    )
