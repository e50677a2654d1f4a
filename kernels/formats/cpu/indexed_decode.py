"""Decoding rows of integers whose columns are in groups by an index, in one pass."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED, compiled
from qlora_compile.kernels.formats.cpu.decode import TYPES
from qlora_compile.kernels.formats.cpu.group_decode import (
    FACTOR,
    FACTOR_NAMES,
    FACTOR_TYPES,
    constant,
)

_NIBBLES = r"""
// The sixteen values of every group first: a weight is then one of them, which vectors gather.
static inline void decode_row(
    const uint8_t* in, const float* scales, const float* zeros, const int32_t* index,
    int64_t columns, int64_t groups, float* table, uint8_t* row, TYPE* out) {
  for (int64_t g = 0; g < groups; ++g)
#pragma omp simd
    for (int64_t c = 0; c < 16; ++c) table[g * 16 + c] = (c - zeros[g]) * scales[g];
#pragma omp simd
  for (int64_t i = 0; i < (columns + 1) / 2; ++i) {
    row[2 * i] = in[i] & 15;
    row[2 * i + 1] = in[i] >> 4;
  }
#pragma omp simd
  for (int64_t k = 0; k < columns; ++k) store(out + k, table[index[k] * 16 + row[k]]);
}
"""

_BYTES = r"""
static inline void decode_row(
    const uint8_t* in, const float* scales, const float* zeros, const int32_t* index,
    int64_t columns, int64_t, float*, uint8_t*, TYPE* out) {
#pragma omp simd
  for (int64_t k = 0; k < columns; ++k)
    store(out + k, (static_cast<float>(in[k]) - zeros[index[k]]) * scales[index[k]]);
}
"""

_ROWS = r"""
#include <vector>

extern "C" void kernel(
    const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros, const int32_t* index,
    int64_t scale_type, int64_t zero_type, int64_t zero_step, int64_t rows, int64_t columns,
    int64_t groups, int64_t threads, TYPE* out) {
  const int64_t row_bytes = (columns * BITS + 7) / 8;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row_scales(groups), row_zeros(groups), table(groups * 16);
    std::vector<uint8_t> row(columns + 1);
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        row_scales[g] = factor(scales, scale_type, r * groups + g);
        row_zeros[g] = factor(zeros, zero_type, zero_step * (r * groups + g));
      }
      decode_row(
          codes + r * row_bytes, row_scales.data(), row_zeros.data(), index, columns, groups,
          table.data(), row.data(), out + r * columns);
    }
  }
}
"""


def write_rows(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    symmetric_zero: float,
    index: Tensor,
    bits: int,
    out: Tensor,
) -> None:
    """out [rows, K] = (code - zero) * scale of the group `index`, int32 [K], rounded once.

    The others as in `group_decode.write_rows`; codes have 4 or 8 `bits`.
    """
    step = int(zeros is not None)
    if zeros is None:
        zeros = constant(symmetric_zero)
    rows, columns = out.shape
    types = (FACTOR_TYPES[FACTOR_NAMES[each.dtype]] for each in (scales, zeros))
    sizes = (*types, step, rows, columns, scales.shape[1], torch.get_num_threads())
    compiled(*_typed(bits, out.dtype))(codes, scales, zeros, index, *sizes, out)


@functools.cache
def _typed(bits: int, dtype: torch.dtype) -> tuple[str, tuple[str, ...]]:
    """Return the source for results of `dtype`, and the types of its arguments."""
    code = VECTORISED + BFLOAT16 + FACTOR + (_NIBBLES if bits == 4 else _BYTES) + _ROWS
    for name, meant in (FACTOR_TYPES | {"TYPE": TYPES[dtype], "BITS": bits}).items():
        code = re.sub(rf"\b{name}\b", str(meant), code)
    pointers = (*["const uint8_t*"] * 3, "const int32_t*")
    return code, (*pointers, *["int64_t"] * 7, f"{TYPES[dtype]}*")
