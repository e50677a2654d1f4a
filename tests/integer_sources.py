"""Linears in the storage of other libraries: random codes, and what these decode them to.

GPTQ has no package that can be installed here; its codes are decoded here with Python's integers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from safetensors.torch import save_file
from torch import Tensor, nn

GROUP = 32


@dataclass(frozen=True)
class Stored:
    """tensors: by the end of their names. weight: float32 [N, K], what the tensors stand for."""

    tensors: dict[str, Tensor]
    weight: Tensor


@dataclass(frozen=True)
class IntegerSource:
    """settings: the `quantization_config`. store: makes a Linear's tensors, of its weight."""

    settings: dict[str, Any]
    store: Callable[[Tensor], Stored]


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def codes_of(words: Tensor, bits: int, count: int) -> Tensor:
    """int64 [rows, count] of int32 [rows, …]: each row is one number, the first code lowest."""
    rows = [int.from_bytes(row.numpy().tobytes(), "little") for row in words.contiguous()]
    mask = 2**bits - 1
    return torch.tensor([[row >> bits * i & mask for i in range(count)] for row in rows])


def gptq(bits: int, version: int, act_order: bool) -> IntegerSource:
    name = {1: "gptq", 2: "gptq_v2"}[version]

    def store(weight: Tensor) -> Stored:
        rows, columns = weight.shape
        groups = columns // GROUP
        index = torch.arange(columns) // GROUP
        index = index[torch.randperm(columns)] if act_order else index
        tensors = {
            "qweight": words(columns * bits // 32, rows),
            "qzeros": words(groups, rows * bits // 32),
            "scales": (torch.rand(groups, rows) * 0.3 / 2**bits).half(),
            "g_idx": index.to(torch.int32),
        }
        codes = codes_of(tensors["qweight"].t(), bits, columns)
        zeros = codes_of(tensors["qzeros"], bits, rows).t() + (version == 1)
        scales = tensors["scales"].float().t()
        return Stored(tensors, (codes - zeros[:, index]).float() * scales[:, index])

    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": act_order}
    return IntegerSource(settings | {"sym": False, "checkpoint_format": name}, store)


def awq() -> IntegerSource:
    converter = AutoAWQConverter(group_size=GROUP)

    def store(weight: Tensor) -> Stored:
        rows, columns = weight.shape
        groups = columns // GROUP
        qweight, qzeros = words(columns, rows // 8), words(groups, rows // 8)
        scales = (torch.rand(groups, rows) * 0.02).half()
        codes, factors, zeros = converter._convert_gemm_module(qweight, scales, qzeros)
        assert zeros is not None
        spread = [each.float().repeat_interleave(GROUP, 1) for each in (zeros, factors)]
        tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        return Stored(tensors, (codes.float() - spread[0]) * spread[1])

    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    return IntegerSource(settings | {"zero_point": True}, store)


def hqq(bits: int, group_size: int) -> IntegerSource:
    config = BaseQuantizeConfig(bits, group_size, axis=1)

    def store(weight: Tensor) -> Stored:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        layer: Any = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        wide = {name: layer.meta[name].float() for name in ("scale", "zero")}
        wide |= {"compute_dtype": torch.float32}
        decoded = Quantizer.dequantize(layer.W_q.data, layer.meta | wide)
        return Stored({name: each.detach() for name, each in layer.state_dict().items()}, decoded)

    return IntegerSource({"quant_method": "hqq", "quant_config": config}, store)


def compressed(bits: int, strategy: str, symmetric: bool) -> IntegerSource:
    size = GROUP if strategy == "group" else None
    options: Any = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size}
    args = QuantizationArgs(**options, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = PackedQuantizationCompressor if bits < 8 else IntQuantizationCompressor
    name = "pack-quantized" if bits < 8 else "int-quantized"

    def store(weight: Tensor) -> Stored:
        rows, groups = weight.shape[0], 1 if size is None else weight.shape[1] // size
        plain = {"weight": weight, "weight_scale": torch.rand(rows, groups) * 0.02 + 0.001}
        if not symmetric:
            zeros = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, groups))
            plain["weight_zero_point"] = zeros.to(torch.int8)
        tensors = compressor.compress(plain, scheme)
        return Stored(tensors, compressor.decompress(tensors, scheme)["weight"])

    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return IntegerSource(settings | {"format": name, "ignore": ["lm_head"]}, store)


SOURCES = {
    "gptq v1": gptq(4, 1, act_order=False),
    "gptq v2 act-order": gptq(4, 2, act_order=True),
    "gptq v1 3 bits": gptq(3, 1, act_order=False),
    "gptq v1 8 bits act-order": gptq(8, 1, act_order=True),
    "awq": awq(),
    "hqq": hqq(4, 64),
    "hqq 2 bits": hqq(2, 32),
    "compressed-tensors": compressed(4, "group", symmetric=False),
    "compressed-tensors 3 bits": compressed(3, "channel", symmetric=True),
    "compressed-tensors 8 bits": compressed(8, "channel", symmetric=False),
}


def store_in(model: nn.Module, source: IntegerSource) -> dict[str, Stored]:
    """Give every Linear but the head the decoded values; return what is stored, by name."""
    torch.manual_seed(3)
    found = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and "lm_head" not in name:
            found[name] = source.store(linear.weight.detach())
            linear.weight.data = found[name].weight.to(linear.weight.dtype)
    return found


def write(folder: Path, model: Any, source: IntegerSource) -> None:
    """Write the checkpoint of `model`, whose Linears get the values of what is stored."""
    stored = store_in(model, source)
    tensors = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in stored
    }
    for name, each in stored.items():
        tensors |= {f"{name}.{role}": tensor.contiguous() for role, tensor in each.tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "architectures": [type(model).__name__],
        "quantization_config": source.settings,
    }
    path.write_text(json.dumps(config))
