"""Double quantisation: absmax values stored as 8-bit codes of the dynamic map.

The scheme of QLoRA (Dettmers et al. 2023, section 3, "Double Quantization") in the layout of
bitsandbytes: the mean of all absmax values is taken off, the rest is quantised in blocks of 256
with the signed dynamic map of "8-Bit Optimizers via Block-wise Quantization" (Dettmers et al.
2022, section 1.3).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qlora_compile.kernels.packed import PackedWeight

NESTED_BLOCK_SIZE = 256
"""Absmax values per second-level block of double quantisation (QLoRA, Dettmers et al. 2023)."""

_GRID = 65535
"""bitsandbytes' CPU code snaps a normalised value to this many steps over [-1, 1] before it looks
up the nearest code, so that a few values next to a decision boundary get the farther code."""


def dynamic_map() -> Tensor:
    """Return the signed 8-bit dynamic map, float32 [256] on CPU, ascending.

    Seven decades 10^-6 … 1, decade i holding 2^i evenly spaced fractions per sign, each the middle
    of its cell of [0.1, 1]; then 0 and 1.
    """
    decades = 7
    values = [0.0, 1.0]
    for decade in range(decades):
        cells = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        middles = (cells[:-1] + cells[1:]) / 2.0
        magnitudes = (10.0 ** (decade - (decades - 1)) * middles).tolist()
        values += magnitudes + [-magnitude for magnitude in magnitudes]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (dynamic map float32 [256], code of each grid step uint8 [65536]) on `device`."""
    with torch.inference_mode(False):
        codebook = dynamic_map()
        boundaries = (codebook[:-1] + codebook[1:]) * 0.5
        steps = torch.arange(_GRID + 1, dtype=torch.float32, device="cpu")
        grid = (steps + steps) / _GRID - 1.0
        nearest = torch.bucketize(grid, boundaries, out_int32=True).to(torch.uint8)
        return codebook.to(device), nearest.to(device)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise `absmax`, float32 [blocks] and finite, at the second level.

    Returns `(codes, nested_codebook, nested_absmax, nested_offset)`: uint8 [blocks], float32
    [256], float32 [ceil(blocks / 256)], float32 [], bit for bit as bitsandbytes on a CPU.
    """
    codebook, nearest = _tables(absmax.device)
    offset = absmax.mean()
    blocks = absmax.numel()
    padded = torch.nn.functional.pad(absmax - offset, (0, -blocks % NESTED_BLOCK_SIZE))
    groups = padded.view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = groups.abs().amax(dim=1)
    scaled = (groups * (1.0 / nested_absmax).unsqueeze(1)).clamp_(-1.0, 1.0)
    # The reference contracts `x * 65535 + 0.5` to one fused multiply-add; both the product and the
    # sum are exact in float64, so rounding that to float32 is the same single rounding.
    fraction = ((scaled + 1.0) * 0.5).double()
    steps = (fraction * _GRID + 0.5).float().nan_to_num_(nan=0.0)
    codes = nearest[steps.to(torch.int64)]
    codes.masked_fill_((nested_absmax == 0).unsqueeze(1), 0)
    # Cloned: a part of the padded codes is not a tensor that safetensors would save.
    return codes.view(-1)[:blocks].clone(), codebook.clone(), nested_absmax, offset


def block_absmax(packed: PackedWeight, start: int, stop: int) -> Tensor:
    """Return the first-level absmax of blocks `start` … `stop`, float32 [stop - start]."""
    absmax, *nested = (plane.reshape(-1) for plane in packed.tensors[1:])
    if not nested:
        return absmax[start:stop]
    codebook, nested_absmax, offset = nested
    first = start // NESTED_BLOCK_SIZE
    last = -(-stop // NESTED_BLOCK_SIZE)
    scales = nested_absmax[first:last].unsqueeze(1)
    scales = scales.expand(-1, NESTED_BLOCK_SIZE).reshape(-1)
    shift = first * NESTED_BLOCK_SIZE
    decoded = codebook.index_select(0, absmax[start:stop].to(torch.int32))
    return decoded.mul_(scales[start - shift : stop - shift]).add_(offset)
