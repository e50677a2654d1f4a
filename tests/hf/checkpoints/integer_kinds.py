"""Kinds of integers: random codes, and other libraries' decoders for them.

No package that reads GPTQ can be installed here; its codes are decoded with Python's integers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import Tensor, nn

from tests.hf.checkpoints.kind import Kind

GROUP = 32
Tensors = dict[str, Tensor]


def _seeded(weight: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(weight.abs().sum() * 1e4))


def _words(chance: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=chance).to(torch.int32)


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Return codes, int64 [rows, count], of int32 [rows, …]: each row is one number, with the first
    code lowest."""
    rows = [int.from_bytes(row.numpy().tobytes(), "little") for row in words.contiguous()]
    mask = 2**bits - 1
    return torch.tensor([[row >> bits * i & mask for i in range(count)] for row in rows])


def _gptq_tensors(bits: int, act_order: bool, weight: Tensor) -> Tensors:
    (n, k), chance = weight.shape, _seeded(weight)
    index = torch.arange(k) // GROUP
    if act_order:
        # One order for all weights of so many columns: those of experts are stored together.
        index = index[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
    return {
        ".qweight": _words(chance, k * bits // 32, n),
        ".qzeros": _words(chance, k // GROUP, -(-n * bits // 32)),
        ".scales": (torch.rand(k // GROUP, n, generator=chance) * 0.3 / 2**bits).half(),
        ".g_idx": index.to(torch.int32),
    }


def _gptq_decoded(bits: int, version: int, tensors: Tensors) -> Tensor:
    index, scales = tensors[".g_idx"].long(), tensors[".scales"].float().t()
    codes = _codes(tensors[".qweight"].t(), bits, len(index))
    zeros = _codes(tensors[".qzeros"], bits, scales.shape[0]).t() + (version == 1)
    return (codes - zeros[:, index]).float() * scales[:, index]


def gptq(bits: int, version: int, act_order: bool) -> Kind:
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": act_order,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version],
    }
    encode, decode = partial(_gptq_tensors, bits, act_order), partial(_gptq_decoded, bits, version)
    return Kind(settings, encode, decode, "int4" if bits <= 4 else "uint8")


def _awq_tensors(weight: Tensor) -> Tensors:
    (n, k), chance = weight.shape, _seeded(weight)
    return {
        ".qweight": _words(chance, k, n // 8),
        ".qzeros": _words(chance, k // GROUP, n // 8),
        ".scales": (torch.rand(k // GROUP, n, generator=chance) * 0.02).half(),
    }


def _awq_decoded(tensors: Tensors) -> Tensor:
    """Decode here: the converter reads codes and zero points, and applies neither."""
    codes, scales, zeros = AutoAWQConverter(group_size=GROUP)._convert_gemm_module(
        tensors[".qweight"], tensors[".scales"], tensors[".qzeros"]
    )
    assert zeros is not None
    zeros, scales = (each.float().repeat_interleave(GROUP, 1) for each in (zeros, scales))
    return (codes.float() - zeros) * scales


def _hqq_tensors(config: Any, weight: Tensor) -> Tensors:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    layer: Any = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    return {f".{name}": each.detach() for name, each in layer.state_dict().items()}


def _hqq_decoded(tensors: Tensors) -> Tensor:
    """Decode in float32, where nothing is rounded; hqq rounds twice in its compute dtype."""
    meta: dict[str, Any] = {
        "packing": "".join(map(chr, tensors[".packing"])),
        "shape": tuple(tensors[".shape"].tolist()),
        "view_as_float": False,
        "compute_dtype": torch.float32,
    }
    meta |= {name: int(tensors[f".{name}"]) for name in ("nbits", "group_size", "axis")}
    meta |= {name: tensors[f".{name}"].float() for name in ("scale", "zero")}
    return Quantizer.dequantize(tensors[".W_q"], meta)


def hqq(bits: int, group_size: int) -> Kind:
    config = BaseQuantizeConfig(bits, group_size, axis=1)
    settings = {"quant_method": "hqq", "quant_config": config}
    return Kind(settings, partial(_hqq_tensors, config), _hqq_decoded, "int4")


def _compressed_tensors(scheme: Any, compressor: Any, weight: Tensor) -> Tensors:
    (n, k), args, chance = weight.shape, scheme.weights, _seeded(weight)
    groups = 1 if args.group_size is None else k // args.group_size
    plain = {
        "weight": weight,
        "weight_scale": torch.rand(n, groups, generator=chance) * 0.02 + 0.001,
    }
    if not args.symmetric:
        middle = 2 ** (args.num_bits - 1)
        zeros = torch.randint(-middle, middle, (n, groups), generator=chance)
        plain["weight_zero_point"] = zeros.to(torch.int8)
    return {f".{name}": each for name, each in compressor.compress(plain, scheme).items()}


def _compressed_decoded(scheme: Any, compressor: Any, tensors: Tensors) -> Tensor:
    state = {name[1:]: each for name, each in tensors.items()}
    return compressor.decompress(state, scheme)["weight"]


def compressed(bits: int, strategy: str, symmetric: bool) -> Kind:
    size = GROUP if strategy == "group" else None
    options: Any = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size}
    args = QuantizationArgs(**options, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = PackedQuantizationCompressor if bits < 8 else IntQuantizationCompressor
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": "pack-quantized" if bits < 8 else "int-quantized",
        "ignore": ["lm_head"],
    }
    return Kind(
        settings,
        partial(_compressed_tensors, scheme, compressor),
        partial(_compressed_decoded, scheme, compressor),
        "int4" if bits <= 4 else "uint8",
    )


INTEGERS: dict[str, Kind] = {
    "gptq": gptq(4, 1, act_order=False),
    "gptq v2, act-order": gptq(4, 2, act_order=True),
    "gptq, 3 bits": gptq(3, 1, act_order=False),
    "gptq, 8 bits, act-order": gptq(8, 1, act_order=True),
    "awq": Kind(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        *(_awq_tensors, _awq_decoded, "int4"),
    ),
    "hqq": hqq(4, 64),
    "hqq, 2 bits": hqq(2, 32),
    "pack-quantized": compressed(4, "group", symmetric=False),
    "pack-quantized, 3 bits, rows": compressed(3, "channel", symmetric=True),
    "int-quantized, rows": compressed(8, "channel", symmetric=False),
}
