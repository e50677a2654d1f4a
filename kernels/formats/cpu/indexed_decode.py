"""Decodes rows of integers, whose columns are in groups by an index, in one pass."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED, compiled
from qlora_compile.kernels.formats.cpu.decode import TYPES
from qlora_compile.kernels.formats.cpu.group_codes import AFFINE
from qlora_compile.kernels.formats.cpu.group_decode import (
    FACTOR_NAMES,
    FACTOR_TYPES,
    WIDEN,
    Factors,
    constant,
)

_NIBBLES = r"""
// The sixteen values of every group first: a weight is then one of them, which vectors gather.
static inline void decode_row(
    const uint8_t* in, const float* scales, const float* zeros, const int32_t* index, bool adds,
    int64_t columns, int64_t groups, float* table, uint8_t* row, TYPE* out) {
  for (int64_t g = 0; g < groups; ++g)
#pragma omp simd
    for (int64_t c = 0; c < 16; ++c) table[g * 16 + c] = affine(c, zeros[g], scales[g], adds);
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
    const uint8_t* in, const float* scales, const float* zeros, const int32_t* index, bool adds,
    int64_t columns, int64_t, float*, uint8_t*, TYPE* out) {
#pragma omp simd
  for (int64_t k = 0; k < columns; ++k)
    store(out + k, affine(static_cast<float>(in[k]), zeros[index[k]], scales[index[k]], adds));
}
"""

_ROWS = r"""
extern "C" void kernel(
    const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros, const int32_t* index,
    int64_t scale_type, int64_t zero_type, int64_t has_zeros, int64_t first_row, int64_t adds,
    int64_t rows, int64_t columns, int64_t groups, int64_t threads, TYPE* out) {
  const int64_t row_bytes = (columns * BITS + 7) / 8;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row_scales(groups), row_zeros(groups), table(groups * 16);
    std::vector<uint8_t> row(columns + 1);
    if (!has_zeros) row_zeros.assign(groups, *reinterpret_cast<const float*>(zeros));
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first_row + r) * groups;
      widen(scales, scale_type, nullptr, 1.0f, at, groups, row_scales.data());
      if (has_zeros) widen(zeros, zero_type, nullptr, 1.0f, at, groups, row_zeros.data());
      decode_row(
          codes + (first_row + r) * row_bytes, row_scales.data(), row_zeros.data(), index, adds,
          columns, groups, table.data(), row.data(), out + r * columns);
    }
  }
}
"""


def write_rows(
    codes: Tensor, factors: Factors, size: int, index: Tensor, bits: int, start: int, out: Tensor
) -> None:
    """Write the rows from `start` on of a weight whose columns are in the groups `index`, int32
    [K], rounded once, to out [rows, K].

    Other arguments: as in `group_decode.write_rows`; codes have 4 or 8 `bits`.
    """
    scales, zeros = factors.scales, factors.zeros
    has_zeros = zeros is not None
    if zeros is None:
        zeros = constant(factors.constant)
    rows, columns = out.shape
    types = (FACTOR_TYPES[FACTOR_NAMES[each.dtype]] for each in (scales, zeros))
    groups = -(-columns // size)
    sizes = (*types, int(has_zeros), start, int(factors.adds), rows, columns, groups)
    planes = (each.contiguous() for each in (codes, scales, zeros, index))
    compiled(*_typed(bits, out.dtype))(*planes, *sizes, torch.get_num_threads(), out)


@functools.cache
def _typed(bits: int, dtype: torch.dtype) -> tuple[str, tuple[str, ...]]:
    """Return the source for results of `dtype`, and the types of its arguments."""
    code = VECTORISED + BFLOAT16 + AFFINE + WIDEN + (_NIBBLES if bits == 4 else _BYTES) + _ROWS
    for name, meant in (FACTOR_TYPES | {"TYPE": TYPES[dtype], "BITS": bits}).items():
        code = re.sub(rf"\b{name}\b", str(meant), code)
    pointers = (*["const uint8_t*"] * 3, "const int32_t*")
    return code, (*pointers, *["int64_t"] * 9, f"{TYPES[dtype]}*")
