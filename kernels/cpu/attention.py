"""Gradients of scaled dot-product attention in bfloat16 on CPUs with AVX-512, block by block, by
AMX's tiles where the CPU has them. Torch's own take several times as long."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.native import NativeKernel
from qlora_compile.kernels.gpu.target import target_of

_FILES = ("attention_operands", "attention")
_KERNEL = NativeKernel(
    sources=(
        ("amx", ("tiles", "tiles_amx", *_FILES)),
        ("avx512", ("tiles", "tiles_avx512", *_FILES)),
    ),
    arguments=(
        *["const uint16_t*"] * 5,
        *("const float*", "const uint8_t*"),
        *["uint16_t*"] * 3,
        "const int64_t*",
        *["int64_t"] * 8,
        *("float", "int64_t"),
    ),
)

start = _KERNEL.start


def available(*operands: Tensor) -> bool:
    """Whether `gradients` takes these operands."""
    return expected(*operands) and _KERNEL.function() is not None


def expected(*operands: Tensor) -> bool:
    """Whether gradients are `available`, provided that the kernel can be built."""
    kind = {(each.device.type, each.dtype) for each in operands}
    # Where CPUs count as a GPU, they stand for one here too.
    return kind == {("cpu", torch.bfloat16)} and target_of("cpu") is None and _KERNEL.expected()


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
    kernel = _KERNEL.function()
    assert kernel is not None
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    bias, steps = log_sum, (0, 0, 0)
    if attn_mask is not None:
        narrow = attn_mask.dtype in (torch.bfloat16, torch.float32)
        bias = attn_mask if narrow else attn_mask.float()
        bias = bias.expand(*bias.shape[:-2], queries, keys)
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        steps = bias.expand(batch, heads, queries, keys).stride()[:3]
    inputs = [query, key, value, grad if grad.stride(3) == 1 else grad.contiguous(), out]
    results = [torch.empty_like(each) for each in inputs[:3]]
    strides = [each.stride()[:3] for each in inputs]
    strides += [log_sum.stride(), steps, *(each.stride()[:3] for each in results)]
    shape = (
        0 if attn_mask is None else bias.itemsize,
        batch,
        groups,
        heads // groups,
        queries,
        keys,
        width,
    )
    settings = (*shape, int(is_causal), scale, torch.get_num_threads())
    kernel(*inputs, log_sum, bias, *results, torch.tensor(strides), *settings)
    return results[0], results[1], results[2]
