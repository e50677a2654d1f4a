"""Launches of the adapters' thin products, each for all Linears of a call that can share one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.kernels.gpu.adapter_gradient import adapter_gradient_kernel, add_up_kernel
from qlora_compile.kernels.gpu.configs import padded
from qlora_compile.kernels.gpu.launch import TRITON_DTYPES, Launch, with_contiguous_rows
from qlora_compile.kernels.gpu.low_rank import low_rank_kernel
from qlora_compile.kernels.gpu.parts import all_or_none, launched_together

_PROGRAMS = 256
"""The number of programs that fill any of today's cards about twice."""


@dataclass(frozen=True)
class ThinProduct:
    """The product drop(x) [M, K] @ factor [rank, K]ᵀ. bits: the packed dropout mask of x. Dropout
    only sets elements to zero; the caller divides by the probability of keeping one."""

    x: Tensor
    factor: Tensor
    bits: Tensor | None = None


def low_ranks(products: Sequence[ThinProduct], dtype: torch.dtype) -> list[Tensor]:
    """Compute products of equally many rows M in `dtype`. Return each as float32 planes [splits, M,
    rank], the parts of a sum."""
    contiguous = [ThinProduct(with_contiguous_rows(p.x), p.factor, p.bits) for p in products]
    return launched_together(contiguous, _low_rank_key, lambda alike: _low_ranks(alike, dtype))


def low_rank(x: Tensor, factor: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Tensor:
    """Do as `low_ranks` for one product."""
    return low_ranks([ThinProduct(x, factor, bits)], dtype)[0]


def _low_rank_key(product: ThinProduct) -> Hashable:
    x, factor = product.x, product.factor
    return x.dtype, factor.dtype, factor.shape[0], factor.stride(), product.bits is None


def _low_ranks(products: Sequence[ThinProduct], dtype: torch.dtype) -> list[Tensor]:
    x, factor = products[0].x, products[0].factor
    rows, rank = x.shape[0], factor.shape[0]
    block_m, block_k, block_rank = 64, 64, _rank_block(rank, x.dtype)
    blocks = -(-rank // block_rank)
    grid = (-(-rows // block_m), len(products) * blocks)
    longest = max(product.x.shape[1] for product in products)
    splits = splits_of(grid[0] * grid[1], -(-longest // block_k))
    out = x.new_empty(splits, rows, len(products) * rank, dtype=torch.float32)
    arguments = {
        "xs": tuple(product.x for product in products),
        "x_strides": tuple(product.x.stride(0) for product in products),
        "factors": tuple(product.factor for product in products),
        "factor_stride_r": factor.stride(0),
        "factor_stride_k": factor.stride(1),
        "bits": all_or_none(product.bits for product in products),
        "out": out,
        "out_stride_split": out.stride(0),
        "M": rows,
        "Ks": tuple(product.x.shape[1] for product in products),
        "rank": rank,
    }
    constexprs = {
        "LORA": TRITON_DTYPES[dtype],
        "BM": block_m,
        "BK": block_k,
        "BRANK": block_rank,
        "BLOCKS": blocks,
        "PARTS": len(products),
        "SPLITS": splits,
        "EVEN_K": all(product.x.shape[1] % block_k == 0 for product in products),
    }
    Launch(low_rank_kernel, (*grid, splits), arguments, constexprs, num_warps=8).run()
    return list(out.split(rank, dim=2))


def added_up(planes: Tensor) -> Tensor:
    """Return the sum over the first dimension, in a fixed order; one plane needs no launch."""
    return planes[0] if planes.shape[0] == 1 else planes.sum(0)


@dataclass(frozen=True)
class AdapterGradient:
    """The gradient out [C, rank] = drop(z) [M, C]ᵀ @ low [M, rank]. out: contiguous, or the
    transpose of a contiguous tensor, of any dtype. bits: the packed dropout mask of z."""

    z: Tensor
    low: Tensor
    out: Tensor
    bits: Tensor | None = None

    @property
    def transposed(self) -> bool:
        return not self.out.is_contiguous()


def adapter_gradients(gradients: Sequence[AdapterGradient], dtype: torch.dtype) -> None:
    """Fill `out` of each gradient, all with equally many rows M, by products in `dtype`.

    Partial sums are float32 and added in a fixed order, so that the bits are the same every time.
    """
    rows = [
        AdapterGradient(with_contiguous_rows(g.z), with_contiguous_rows(g.low), g.out, g.bits)
        for g in gradients
    ]
    planes = launched_together(rows, _gradient_key, lambda alike: _gradients(alike, dtype))
    partial = [(p, g.out) for p, g in zip(planes, rows, strict=True) if p is not None]
    launched_together(partial, lambda part: part[1].dtype, _add_up)


def _gradient_key(gradient: AdapterGradient) -> Hashable:
    z, low, masked = gradient.z, gradient.low, gradient.bits is not None
    # In a launch of several, a masked float16 z would spill registers on sm_80.
    alone = id(gradient) if masked and z.dtype == torch.float16 else None
    return z.dtype, low.dtype, low.shape[1], gradient.transposed, masked, alone


def _gradients(gradients: Sequence[AdapterGradient], dtype: torch.dtype) -> list[Tensor | None]:
    """Return float32 planes [splits, C, rank], perhaps transposed, of each; None if `out` is
    already written."""
    z, rank = gradients[0].z, gradients[0].low.shape[1]
    transposed = gradients[0].transposed
    rows, most = z.shape[0], max(each.z.shape[1] for each in gradients)
    block_m, block_c, block_rank = 64, 64, _rank_block(rank, z.dtype)
    blocks = -(-rank // block_rank)
    grid = (-(-most // block_c), len(gradients) * blocks)
    splits = splits_of(grid[0] * grid[1], -(-rows // block_m))
    outs = [each.out.t() if transposed else each.out for each in gradients]
    whole = splits == 1 and all(out.dtype == torch.float32 for out in outs)
    planes = [
        out[None] if whole else z.new_empty(splits, *out.shape, dtype=torch.float32) for out in outs
    ]
    arguments = {
        "zs": tuple(each.z for each in gradients),
        "z_strides": tuple(each.z.stride(0) for each in gradients),
        "lows": tuple(each.low for each in gradients),
        "low_strides": tuple(each.low.stride(0) for each in gradients),
        "bits": all_or_none(each.bits for each in gradients),
        "outs": tuple(planes),
        "out_strides_split": tuple(each.stride(0) for each in planes),
        "out_strides": tuple(each.stride(1) for each in planes),
        "M": rows,
        "Cs": tuple(each.z.shape[1] for each in gradients),
        "rank": rank,
    }
    constexprs = {
        "LORA": TRITON_DTYPES[dtype],
        "BM": block_m,
        "BC": block_c,
        "BRANK": block_rank,
        "BLOCKS": blocks,
        "PARTS": len(gradients),
        "SPLITS": splits,
        "EVEN_C": all(each.z.shape[1] % block_c == 0 for each in gradients),
        "TRANSPOSED": transposed,
    }
    Launch(adapter_gradient_kernel, (*grid, splits), arguments, constexprs, num_warps=8).run()
    return [None if whole else each for each in planes]


def _add_up(parts: Sequence[tuple[Tensor, Tensor]]) -> list[None]:
    """Write the sum of the first tensor's planes of each pair to the second tensor."""
    size, counts = 1024, [out.numel() for _, out in parts]
    arguments = {
        "planes": tuple(planes for planes, _ in parts),
        "splits": tuple(planes.shape[0] for planes, _ in parts),
        "outs": tuple(out for _, out in parts),
        "counts": tuple(counts),
    }
    constexprs = {"PARTS": len(parts), "SIZE": size}
    grid = (-(-max(counts) // size), len(parts))
    Launch(add_up_kernel, grid, arguments, constexprs).run()
    return [None] * len(parts)


def _rank_block(rank: int, x_dtype: torch.dtype) -> int:
    """Return how many ranks a program takes: with more, the halves of a float32 factor, or of a
    float16 x, would spill registers."""
    return min(16 if x_dtype == torch.float16 else 32, padded(rank))


def splits_of(programs: int, steps: int) -> int:
    """Return the number of parts to cut a reduction of `steps` into so that programs fill a card.

    It is a power of two, as a kernel is compiled for each: rows of one bucket need one or two.
    """
    most = max(1, min(_PROGRAMS // max(programs, 1), steps // 4))
    return 1 << (most.bit_length() - 1)
