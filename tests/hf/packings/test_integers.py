"""Packed integers of other libraries decode to the same values as by the libraries' own code."""

from __future__ import annotations

from typing import Any

import gguf
import numpy
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor
from torchao.quantization.quant_primitives import MappingType

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.packings import awq, hqq, pack_quantized, torchao_integers
from qlora_compile.hf.packings.bits import unpacked
from qlora_compile.hf.packings.gguf import PACKINGS
from qlora_compile.hf.packings.integers import packed_integers
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named
from tests.examples import examples

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def decoded(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    for name, plane in weight.planes.items():
        # Compiled decoders read the memory, and safetensors saves no views.
        assert plane.is_contiguous(), name
        assert plane.untyped_storage().nbytes() == plane.numel() * plane.element_size(), name
    return format_named(weight.format).dequantize(weight, dtype)


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


@settings(max_examples=examples(30))
@given(bits=st.integers(1, 8), count=st.integers(1, 100), seed=st.integers(0, 99))
def test_streams_of_bits(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(seed))
    middle = 2 ** (bits - 1)
    stored = pack_to_int32((codes - middle).to(torch.int8), bits)
    # Whole, in columns, and as a part of longer rows; then one row alone.
    for words in (stored, stored.t().contiguous().t(), torch.cat([stored] * 2, 1)):
        words = words[:, : stored.shape[1]]
        assert torch.equal(unpacked(words, bits, count), codes.to(torch.uint8))
        assert torch.equal(unpacked(words[:1], bits, count), codes[:1].to(torch.uint8))


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_awq(group_size: int, zero_point: bool) -> None:
    columns, rows, groups = 64, 24, 1 if group_size == -1 else 64 // group_size
    tensors = {"codes": words(columns, rows // 8), "scales": torch.rand(groups, rows).half()}
    zeros = words(groups, rows // 8) if zero_point else None
    if zeros is not None:
        tensors["zeros"] = zeros
    weight = awq.packed(tensors, awq.AwqStorage.read({"group_size": group_size}))
    # The converter reads codes and zero points, and applies neither.
    converter = AutoAWQConverter(zero_point=zero_point)
    codes, scales, points = converter._convert_gemm_module(
        tensors["codes"], tensors["scales"], zeros
    )
    spread = [columns // groups, 1]
    expected = codes.float()
    if points is not None:
        expected -= points.float().repeat_interleave(*spread)
    expected *= scales.float().repeat_interleave(*spread)
    assert torch.equal(decoded(weight), expected)


@pytest.mark.parametrize("view_as_float", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 32), (3, 128), (2, 256), (1, None)])
def test_hqq(bits: int, group_size: Any, view_as_float: bool) -> None:
    config = BaseQuantizeConfig(bits, group_size, view_as_float=view_as_float, axis=1)
    torch.manual_seed(bits)
    layer: Any = HQQLinear(nn.Linear(128, 32), config, compute_dtype=torch.float16, device="cpu")
    tensors = {"codes": layer.W_q.data, "scales": layer.meta["scale"], "zeros": layer.meta["zero"]}
    weight = hqq.packed(tensors, hqq.HqqStorage.read(layer.meta))
    assert weight.format == ("int4" if bits <= 4 else "uint8")
    # hqq rounds twice in its compute dtype; the same values without rounding in float32.
    wide = {name: layer.meta[name].float() for name in ("scale", "zero")}
    expected = Quantizer.dequantize(
        layer.W_q.data, layer.meta | wide | {"compute_dtype": torch.float32}
    )
    assert torch.equal(decoded(weight), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"axis": 0}, r"axis is 0: .*axis=1"),
        ({"packing": None}, "packing is None, not 8bit_u8"),
        ({"quant_zero": True}, "zero points are quantised"),
        ({"group_size": 48}, "not divisible into groups of 48"),
    ],
)
def test_hqq_storage_that_cannot_be_read(changed: dict[str, Any], message: str) -> None:
    meta = {"axis": 1, "packing": "4bit_u8", "shape": (32, 128), "group_size": 64}
    with pytest.raises(StoredWeightError, match=message):
        hqq.HqqStorage.read(meta | changed)


INTX = [
    IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity, mapping)
    for bits, granularity, mapping in (
        (1, PerGroup(32), MappingType.SYMMETRIC),
        (2, PerGroup(64), MappingType.ASYMMETRIC),
        (3, PerAxis(0), MappingType.SYMMETRIC),
        (4, PerGroup(32), MappingType.ASYMMETRIC),
        (6, PerGroup(128), MappingType.SYMMETRIC),
        (8, PerAxis(0), MappingType.ASYMMETRIC),
    )
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "config",
    [Int8WeightOnlyConfig(), Int8WeightOnlyConfig(granularity=PerTensor()), *INTX],
    ids=str,
)
def test_torchao(config: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 24).to(dtype)
    quantize_(linear, config)
    tensor: Any = linear.weight
    weight = torchao_integers.packed_tensor(tensor)
    assert weight.format == torchao_integers.format_name(tensor)
    assert torch.equal(decoded(weight, dtype), tensor.dequantize())


@settings(max_examples=examples(30), deadline=None)
@given(
    bits=st.integers(2, 8),
    strategy=st.sampled_from(["group", "channel", "tensor"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_pack_quantized(bits, strategy, symmetric, dtype, seed) -> None:
    symmetric = symmetric or strategy == "tensor"
    size = 32 if strategy == "group" else None
    options: Any = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size}
    args = QuantizationArgs(**options, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    generator = torch.Generator().manual_seed(seed)
    shape = {"group": (10, 3), "channel": (10, 1), "tensor": (1,)}[strategy]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    plain = {
        "weight": torch.randn(10, 96, generator=generator).to(dtype),
        "weight_scale": (torch.rand(shape, generator=generator) / 10 + 0.01).to(dtype),
    }
    if not symmetric:
        zeros = torch.randint(low, high, shape, generator=generator).to(torch.int8)
        plain["weight_zero_point"] = zeros
    stored = PackedQuantizationCompressor.compress(plain, scheme)
    expected = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    roles = {"weight_packed": "codes", "weight_scale": "scales", "weight_zero_point": "zeros"}
    tensors = {role: stored[name] for name, role in roles.items() if name in stored}
    weight = pack_quantized.packed(
        tensors, (10, 96), pack_quantized.IntegerScheme.read(args.model_dump())
    )
    assert torch.equal(decoded(weight, dtype), expected)


@pytest.mark.parametrize("name", PACKINGS)
def test_gguf(name: str) -> None:
    """Random blocks, with finite numbers of 16 bits at their beginning."""
    kind = gguf.GGMLQuantizationType[name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    generator = numpy.random.default_rng(0)
    blocks = generator.integers(0, 256, (6, 768 // weights, size), dtype=numpy.uint8)
    floats = 2 if name in ("Q4_1", "Q5_1", "Q4_K") else 1
    values = generator.standard_normal((*blocks.shape[:2], floats)).astype(numpy.float16)
    blocks[:, :, : 2 * floats] = values.view(numpy.uint8)
    stored = blocks.reshape(6, -1)
    expected = torch.from_numpy(gguf.dequantize(stored, kind))
    assert torch.equal(decoded(PACKINGS[name]({"codes": torch.from_numpy(stored)})), expected)


@pytest.mark.parametrize(
    ("role", "value", "message"),
    [
        ("scales", torch.ones(4, 3), r"scales: its shape is \[4, 3\], not \[4, 2\]"),
        ("scales", torch.full((4, 2), torch.nan), "scales: it holds NaN"),
        ("minima", torch.full((4, 2), torch.nan), "minima: it holds NaN"),
        ("scales", torch.ones(4, 2, dtype=torch.float64), "scales: its dtype is torch.float64"),
        ("zeros", torch.ones(3, 2), r"zeros: its shape is \[3, 2\]"),
        ("zeros", torch.full((4, 2), torch.inf), "zeros: it holds NaN"),
    ],
)
def test_tensors_that_do_not_fit(role: str, value: Tensor, message: str) -> None:
    tensors: Any = {"scales": torch.ones(4, 2), "zeros": torch.ones(4, 2)} | {role: value}
    with pytest.raises(StoredWeightError, match=message):
        packed_integers(torch.zeros(4, 64, dtype=torch.uint8), 4, **tensors, group_size=32)
