"""Scaled dot-product attention in bfloat16 and its gradients on CPUs with AVX-512, block by block,
by AMX's tiles where the CPU has them; torch's gradients take several times as long."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.native import NativeKernel
from qlora_compile.kernels.gpu.target import target_of


def _sources(*files: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return a kernel's sources, over the products of tiles of each level."""
    return tuple((level, ("tiles", f"tiles_{level}", *files)) for level in ("amx", "avx512"))


_SHAPE = (*["int64_t"] * 8, "float", "int64_t")
_FORWARD = NativeKernel(
    sources=_sources("attention_operands", "attention_forward"),
    arguments=(
        *["const uint16_t*"] * 3,
        *("const uint8_t*", "uint16_t*", "float*", "const int64_t*"),
        *_SHAPE,
    ),
)
_GRADIENTS = NativeKernel(
    sources=_sources("attention_operands", "attention"),
    arguments=(
        *["const uint16_t*"] * 5,
        *("const float*", "const uint8_t*"),
        *["uint16_t*"] * 3,
        "const int64_t*",
        *_SHAPE,
    ),
)


def builds(*, backward: bool) -> list[Callable[[], object]]:
    """Return the calls that build the kernel of one direction."""
    return [_GRADIENTS.function if backward else _FORWARD.function]


def computes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` takes these operands."""
    return expected(query, key, value) and _FORWARD.function() is not None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention, bfloat16 [B, H, M, D], and the log_sum that `gradients` takes, with the
    strides of torch's. Operands are as `gradients` takes them."""
    kernel = _FORWARD.function()
    assert kernel is not None
    batch, heads, queries, _ = query.shape
    out = torch.empty_like(query)
    log_sum = query.new_empty(batch, queries, heads, dtype=torch.float32).transpose(1, 2)
    bias, steps = _bias(attn_mask, query, key, log_sum)
    strides = [each.stride()[:3] for each in (query, key, value)]
    strides += [steps, out.stride()[:3], log_sum.stride()]
    settings = _settings(attn_mask, bias, query, key, is_causal, scale)
    kernel(query, key, value, bias, out, log_sum, torch.tensor(strides), *settings)
    return out, log_sum


def available(*operands: Tensor) -> bool:
    """Whether `gradients` takes these operands."""
    return expected(*operands) and _GRADIENTS.function() is not None


def expected(*operands: Tensor) -> bool:
    """Whether gradients are `available`, provided that the kernel can be built."""
    kind = {(each.device.type, each.dtype) for each in operands}
    # Where CPUs count as a GPU, they stand for one here too.
    return kind == {("cpu", torch.bfloat16)} and target_of("cpu") is None and _GRADIENTS.expected()


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, in their dtypes and strides. All operands but
    `grad` have contiguous rows.

    query, grad, out: bfloat16 [B, H, M, D]. key, value: bfloat16 [B, G, N, D], each for
    H / G heads. log_sum: float32 [B, H, M], of every query's scores, scaled and masked. attn_mask:
    float, of a shape that broadcasts to [B, H, M, N], added to the scores. is_causal: key n counts
    for query m if n <= m.
    """
    kernel = _GRADIENTS.function()
    assert kernel is not None
    bias, steps = _bias(attn_mask, query, key, log_sum)
    inputs = [query, key, value, grad if grad.stride(3) == 1 else grad.contiguous(), out]
    results = [torch.empty_like(each) for each in inputs[:3]]
    strides = [each.stride()[:3] for each in inputs]
    strides += [log_sum.stride(), steps, *(each.stride()[:3] for each in results)]
    settings = _settings(attn_mask, bias, query, key, is_causal, scale)
    kernel(*inputs, log_sum, bias, *results, torch.tensor(strides), *settings)
    return results[0], results[1], results[2]


def _bias(
    mask: Tensor | None, query: Tensor, key: Tensor, other: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    """Return what is added to the scores, in contiguous rows, and its strides; without a mask,
    `other`, because the kernel takes a pointer all the same."""
    if mask is None:
        return other, (0, 0, 0)
    bias = mask if mask.dtype in (torch.bfloat16, torch.float32) else mask.float()
    bias = bias.expand(*bias.shape[:-2], query.shape[2], key.shape[2])
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    return bias, bias.expand(*query.shape[:3], key.shape[2]).stride()[:3]


def _settings(
    mask: Tensor | None, bias: Tensor, query: Tensor, key: Tensor, is_causal: bool, scale: float
) -> tuple[int | float, ...]:
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    size = 0 if mask is None else bias.itemsize
    shape = (size, batch, groups, heads // groups, queries, keys, width)
    return (*shape, int(is_causal), scale, torch.get_num_threads())
