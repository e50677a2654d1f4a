"""8-bit floats with a scale for each tensor, row or block, and MXFP4 experts beside them.

Blocks are those of "DeepSeek-V3 Technical Report" (2024), section 3.3, where they are 128 × 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.kernels.formats.fp8 import FP8_E4M3, FP8_E5M2, Fp8Format
from qlora_compile.kernels.packed import PackedWeight

FORMATS: dict[torch.dtype, Fp8Format] = {each.code_dtype: each for each in (FP8_E4M3, FP8_E5M2)}
COLUMNS = 128
"""The least number of columns that share a scale, in rows with several scales."""


def packed_fp8(
    weight: Tensor, scales: Tensor, block: tuple[int, int] | None = None
) -> PackedWeight:
    """Make a PackedWeight of float8 codes, sharing their memory.

    weight: [N, K], or [E, N, K] for experts. scales: of any floating-point dtype; the value of a
    weight is its code times its scale. Without a `block`, one scale for each [N, K] or for each
    row. With a `block` of [rows, columns], [ceil(N / rows), ceil(K / columns)] scales; columns must
    be a multiple of 128, or K or more.

    Raises StoredWeightError.
    """
    n, k = weight.shape[-2:]
    experts = weight.shape[0] if weight.dim() == 3 else 1
    rows = experts * n
    quant_format = FORMATS[weight.dtype]
    codes = weight.view(torch.uint8).reshape(rows, k)
    scales = scales.float()
    high, wide = block or (n if scales.numel() == experts else 1, k)
    if wide >= k:
        if scales.numel() == 1:
            layout = quant_format.layout((rows, k), scale_per="tensor")
            return quant_format.packed(layout, [codes, scales.reshape(())])
        by_row = scales.reshape(experts, -1).repeat_interleave(high, dim=1)[:, :n]
        layout = quant_format.layout((rows, k), scale_per="row")
        return quant_format.packed(layout, [codes, by_row.reshape(rows).contiguous()])
    if wide % COLUMNS:
        raise StoredWeightError(
            tensor="scales",
            problem=f"blocks of {high} x {wide} share a scale, but every format here has at least "
            f"{COLUMNS} columns to a scale",
            remedy="load the model in 16 bits and quantise it here",
        )
    grid = scales.reshape(experts, -(-n // high), -(-k // wide))
    if high == wide == COLUMNS and (experts == 1 or n % high == 0):
        layout = quant_format.layout((rows, k), scale_per="block")
        return quant_format.packed(layout, [codes, grid.flatten(0, 1)])
    groups = -(-k // COLUMNS)
    by_row = grid.repeat_interleave(high, dim=1)[:, :n]
    by_group = by_row.repeat_interleave(wide // COLUMNS, dim=2)[..., :groups]
    layout = quant_format.layout((rows, k), scale_per="group")
    return quant_format.packed(layout, [codes, by_group.reshape(rows, groups).contiguous()])
