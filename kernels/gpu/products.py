"""Launches of the dropout mask and the standalone dequantisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_compile.kernels.dropout import LANES, ROUNDS, dropout_threshold
from qlora_compile.kernels.gpu.dequantize import dequantize_kernel
from qlora_compile.kernels.gpu.launch import TRITON_DTYPES, Launch
from qlora_compile.kernels.gpu.packed_operand import packed_operand
from qlora_compile.kernels.gpu.philox import keep_bits_kernel
from qlora_compile.kernels.variants.base import LinearSpec
from qlora_compile.kernels.workspace import workspace


def keep_bits(seed: Tensor, spec: LinearSpec, rows: int) -> Tensor:
    """Return the dropout mask of the adapter's input [rows, K], packed: uint8 [rows * K / 8]."""
    count, size = rows * spec.k // LANES, 1024
    bits = torch.empty(count, dtype=torch.uint8, device=seed.device)
    arguments = {
        "seed": seed,
        # Triton's JIT takes no argument named "stream".
        "subsequence": spec.stream,
        "threshold": dropout_threshold(spec.dropout),
        "bits": bits,
        "count": count,
    }
    constexprs = {"SIZE": size, "ROUNDS": ROUNDS}
    Launch(keep_bits_kernel, (-(-count // size),), arguments, constexprs).run()
    return bits


def dequantize(
    planes: Sequence[Tensor],
    spec: LinearSpec,
    dtype: torch.dtype,
    decoder: str,
    up: Tensor | None = None,
    scaling: Tensor | None = None,
) -> Tensor:
    """Return W [N, K] in `dtype`, or [W | scaling * up] [N, K + rank] with up [N, rank] and scaling
    one float32 element; in the workspace."""
    tile_rows, tile_columns = 32, 256
    rank = 0 if up is None else up.shape[1]
    packed = packed_operand(spec.layout, planes, decoder, dtype, tile_columns)
    out = workspace(spec.n, spec.k + rank, dtype=dtype, device=packed.weight.device)
    arguments = {
        **packed.arguments,
        "codes": packed.weight,
        "up": None if up is None else up.contiguous(),
        "scaling": scaling,
        "out": out,
        "out_stride": out.stride(0),
        "N": spec.n,
        "K": spec.k,
        "rank": rank,
    }
    constexprs = {
        **packed.constexprs,
        "DTYPE": TRITON_DTYPES[dtype],
        "ROWS": tile_rows,
        "COLUMNS": tile_columns,
        "EVEN_N": spec.n % tile_rows == 0,
        "EVEN_K": spec.k % tile_columns == 0,
    }
    grid = (-(-spec.n // tile_rows), -(-spec.k // tile_columns) + -(-rank // tile_columns))
    Launch(dequantize_kernel, grid, arguments, constexprs).run()
    return out
