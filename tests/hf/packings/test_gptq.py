"""GPTQ's storage by hand: the bytes follow from AutoGPTQ 0.7's `QuantLinear.pack`.

No package that reads or writes it can be installed here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.packings.gptq import GptqStorage, packed
from qlora_compile.kernels.registry import format_named


def int32(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def decoded(storage: GptqStorage, **tensors: Tensor) -> Tensor:
    weight = packed(tensors, storage)
    return format_named(weight.format).dequantize(weight, torch.float32)


COLUMN = int32(0x76543210, 0xFEDCBA98, 0x00000000, 0xFFFFFFFF).unsqueeze(1)
"""Codes 0 … 15, eight of 0 and eight of 15 in one column of qweight: the weight's row, K = 32."""
CODES = torch.tensor([*range(16), *[0] * 8, *[15] * 8], dtype=torch.float32)


def test_four_bits_of_both_versions() -> None:
    """Eight columns of qzeros lie in a word: 0x7…7 is a zero of 8 in version 1, of 7 in 2."""
    codes = COLUMN.expand(4, 8).contiguous()
    scales = torch.full((1, 8), 0.5, dtype=torch.float16)
    zeros = int32(0x77777777).unsqueeze(0)
    for version, zero in ((1, 8), (2, 7)):
        weight = decoded(GptqStorage(32, 4, version), codes=codes, zeros=zeros, scales=scales)
        assert torch.equal(weight, (CODES - zero).mul(0.5).expand(8, 32))


def test_each_row_has_its_zero_and_scale() -> None:
    codes = COLUMN.expand(4, 8).contiguous()
    scales = torch.arange(1, 9, dtype=torch.float16).unsqueeze(0)
    weight = decoded(
        GptqStorage(-1, 4, 2), codes=codes, zeros=int32(0x76543210)[None], scales=scales
    )
    expected = torch.stack([(CODES - n) * (n + 1) for n in range(8)])
    assert torch.equal(weight, expected)


def test_a_zero_of_sixteen() -> None:
    """Stored as 15 in version 1."""
    scales = torch.ones(1, 8, dtype=torch.bfloat16)
    codes = COLUMN.expand(4, 8).contiguous()
    weight = decoded(
        GptqStorage(32, 4, 1), codes=codes, zeros=int32(0xFFFFFFFF)[None], scales=scales
    )
    assert torch.equal(weight, (CODES - 16).expand(8, 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_eight_bits_and_a_zero_of_256(dtype: torch.dtype) -> None:
    """255 in version 1; the codes of 4 columns are the bytes 0, 1, 128, 255."""
    codes = int32(0xFF800100).view(1, 1).expand(8, 4).contiguous()
    scales = torch.tensor([[1.0, 0.5, 0.25, 2.0]], dtype=dtype)
    weight = decoded(
        GptqStorage(32, 8, 1), codes=codes, zeros=int32(0xFF007F01)[None], scales=scales
    )
    row = torch.tensor([0.0, 1.0, 128.0, 255.0]).repeat(8)
    zeros = (2, 128, 1, 256)
    expected = [(row - zero) * float(scales[0, n]) for n, zero in enumerate(zeros)]
    assert torch.equal(weight, torch.stack(expected))


def test_three_bits_reach_into_the_next_word() -> None:
    """Codes 0, 1, …, 7, 0, … of a column: three words of 32 bits, by the shifts of `pack`."""
    codes = [k % 8 for k in range(32)]
    first = sum(codes[j] << 3 * j for j in range(10)) | (codes[10] & 3) << 30
    second = codes[10] >> 2 | sum(codes[11 + j] << 3 * j + 1 for j in range(10))
    second |= (codes[21] & 1) << 31
    third = codes[21] >> 1 | sum(codes[22 + j] << 3 * j + 2 for j in range(10))
    words = int32(first, second, third).unsqueeze(1).expand(3, 32).contiguous()
    weight = decoded(
        GptqStorage(32, 3, 2),
        codes=words,
        zeros=int32(first, second, third)[None],
        scales=torch.ones(1, 32, dtype=torch.float16),
    )
    expected = torch.tensor(codes).float()[None] - torch.tensor(codes).float()[:, None]
    assert torch.equal(weight, expected)


def test_act_order_tells_the_group_of_each_column() -> None:
    codes = COLUMN.expand(4, 8).contiguous().repeat(2, 1)
    scales = torch.tensor([[1.0], [4.0]], dtype=torch.float16).expand(2, 8).contiguous()
    zeros = int32(0x00000000, 0x33333333).unsqueeze(1)
    index = int32(*[(5 * k + k // 3) % 2 for k in range(64)])
    weight = decoded(GptqStorage(32, 4, 1), codes=codes, zeros=zeros, scales=scales, index=index)
    for k in range(64):
        zero, scale = ((1, 1.0), (4, 4.0))[int(index[k])]
        assert torch.equal(weight[:, k], ((CODES[k % 32] - zero) * scale).expand(8)), k


def test_an_index_of_neighbours_needs_no_plane() -> None:
    tensors = {
        "codes": COLUMN.expand(4, 8).contiguous().repeat(2, 1),
        "scales": torch.rand(2, 8).half(),
        "zeros": int32(0x77777777, 0x66666666).unsqueeze(1),
    }
    storage = GptqStorage(32, 4, 1)
    with_index = packed(tensors | {"index": torch.arange(64, dtype=torch.int32) // 32}, storage)
    without = packed(tensors, storage)
    assert with_index.layout == without.layout
    assert "grouping" not in without.layout.named
    for name, plane in without.planes.items():
        assert torch.equal(with_index.planes[name], plane)


@pytest.mark.parametrize("value", [-1, 2])
def test_a_group_that_is_not_there(value: int) -> None:
    tensors = {
        "codes": COLUMN.expand(4, 8).contiguous().repeat(2, 1),
        "scales": torch.rand(2, 8).half(),
        "zeros": int32(0x77777777, 0x66666666).unsqueeze(1),
        "index": torch.full((64,), value, dtype=torch.int32),
    }
    with pytest.raises(StoredWeightError, match=r"index: .*group numbers from 0 to 1"):
        packed(tensors, GptqStorage(32, 4, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits 5, not 2 or 3 or 4 or 8"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin', not 'gptq', 'gptq_v2'"),
        ({"pack_dtype": "int8"}, "pack_dtype 'int8'"),
        ({"group_size": 0}, "group_size 0"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic, which gives"),
    ],
)
def test_settings_that_cannot_be_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StoredWeightError, match=message):
        GptqStorage.read({"bits": 4, "group_size": 32} | settings)


def test_groups_that_no_format_has() -> None:
    tensors = {
        "codes": COLUMN.expand(4, 8).contiguous(),
        "scales": torch.rand(2, 8).half(),
        "zeros": int32(0x77777777, 0x66666666).unsqueeze(1),
    }
    with pytest.raises(StoredWeightError, match=r"scale for every 16 columns.*multiple of 32"):
        packed(tensors, GptqStorage(16, 4, 1))
