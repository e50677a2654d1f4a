"""Quantised checkpoints of toy models, and other libraries' decoders for them.

`KINDS` has one entry for each way in which a source stores a weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.hf.checkpoints.integer_kinds import INTEGERS
from tests.hf.checkpoints.kind import Kind

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def blocks(weight: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude of each block, and for each weight that of its block."""
    n, k = weight.shape
    padded = nn.functional.pad(weight, (0, -k % wide, 0, -n % high)).abs()
    grid = padded.view(padded.shape[0] // high, high, -1, wide).amax((1, 3))
    return grid, grid.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:n, :k]


def fp8_tensors(weight: Tensor) -> dict[str, Tensor]:
    grid, each = blocks(weight, 128, 128)
    return {
        ".weight": (weight / (each / LARGEST)).to(E4M3),
        ".weight_scale_inv": grid / LARGEST,
    }


def e5m2_tensors(weight: Tensor) -> dict[str, Tensor]:
    grid, each = blocks(weight, 128, 128)
    largest = torch.finfo(torch.float8_e5m2).max
    codes = (weight / (each / largest)).to(torch.float8_e5m2)
    return {".weight": codes, ".weight_scale_inv": grid / largest}


def fp8_power_tensors(weight: Tensor) -> dict[str, Tensor]:
    """Return tensors with powers of two as scales, in e8m0, like DeepSeek-V3.1's."""
    grid, _ = blocks(weight, 128, 128)
    scales = torch.exp2(torch.ceil(torch.log2(grid / LARGEST)))
    n, k = weight.shape
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    stored = scales.to(torch.float8_e8m0fnu)
    return {".weight": (weight / each).to(E4M3), ".weight_scale_inv": stored}


def fp8_whole_tensors(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / LARGEST
    return {".weight": (weight / scale).to(E4M3), ".weight_scale_inv": scale}


def fp4_tensors(weight: Tensor) -> dict[str, Tensor]:
    """Return tensors of MXFP4 in int8, like DeepSeek-V4's experts."""
    n, k = weight.shape
    chance = torch.Generator().manual_seed(int(weight.abs().sum() * 1e4))
    codes = torch.randint(0, 256, (n, k // 2), generator=chance, dtype=torch.uint8)
    scales = torch.randint(118, 124, (n, k // 32), generator=chance, dtype=torch.uint8)
    return {".weight": codes.view(torch.int8), ".scale": scales.view(torch.float8_e8m0fnu)}


def fp8_decoded(tensors: dict[str, Tensor]) -> Tensor:
    scales = next(tensor for name, tensor in tensors.items() if "scale" in name)
    return Fp8Dequantize(None)._dequantize_one(tensors[".weight"], scales, torch.float32)


def mx_tensors(weight: Tensor) -> dict[str, Tensor]:
    """Return tensors of experts [E, N, K], like gpt-oss's."""
    experts, n, k = weight.shape
    chance = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (experts, n, k // 32, 16), generator=chance, dtype=torch.uint8)
    scales = torch.randint(118, 124, (experts, n, k // 32), generator=chance, dtype=torch.uint8)
    return {"_blocks": codes, "_scales": scales}


def mx_decoded(tensors: dict[str, Tensor]) -> Tensor:
    made = convert_moe_packed_tensors(tensors["_blocks"], tensors["_scales"], dtype=torch.float32)
    return made.transpose(1, 2)


def modelopt_tensors(weight: Tensor) -> dict[str, Tensor]:
    n, k = weight.shape
    chance = torch.Generator().manual_seed(int(weight.abs().sum() * 1e4))
    codes = torch.randint(0, 256, (n, k // 2), generator=chance, dtype=torch.uint8)
    scales = (torch.rand(n, k // 16, generator=chance) * 300 + 1).to(E4M3)
    # Powers of two, so that the converter's reciprocal is exact.
    whole = torch.exp2(torch.randint(-17, -13, (), generator=chance).float())
    extra = torch.tensor(0.01)
    return {
        ".weight": codes,
        ".weight_scale": scales,
        ".weight_scale_2": whole,
        ".input_scale": extra,
    }


def modelopt_decoded(tensors: dict[str, Tensor]) -> Tensor:
    named = {f"layer{name}": tensor for name, tensor in tensors.items()}
    converted = ModelOptNvfp4Converter(targets=["re:.*"]).process(named)
    parts = {name.removeprefix("layer."): tensor for name, tensor in converted.items()}
    return nvfp4_decoded(parts)


def nvfp4_decoded(state: dict[str, Tensor]) -> Tensor:
    """Decode like compressed-tensors' decompressor, in float32 in place of its bfloat16."""
    codes = state["weight_packed"]
    unpacked = unpack_fp4_from_uint8(codes, codes.shape[0], 2 * codes.shape[1], torch.float32)
    return dequantize(
        unpacked,
        state["weight_scale"].float(),
        args=SCHEMES["nvfp4-pack-quantized"].weights,
        global_scale=state["weight_global_scale"],
        dtype=torch.float32,
    )


def whole_tensors(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / LARGEST
    return {".weight": (weight / scale).to(E4M3), ".weight_scale": scale}


def whole_decoded(tensors: dict[str, Tensor]) -> Tensor:
    return tensors[".weight"].float() * tensors[".weight_scale"]


def scheme(**weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


SCHEMES = {
    "float-quantized channel": scheme(num_bits=8, type="float", strategy="channel"),
    "float-quantized tensor": scheme(num_bits=8, type="float", strategy="tensor"),
    "float-quantized block": scheme(
        num_bits=8, type="float", strategy="block", block_structure=[128, 128]
    ),
    "nvfp4-pack-quantized": scheme(
        num_bits=4, type="float", strategy="tensor_group", group_size=16
    ),
    "mxfp4-pack-quantized": scheme(num_bits=4, type="float", strategy="group", group_size=32),
}


def compressed(name: str, exact: bool = True, format: str = "fp8_e4m3") -> Kind:
    """Return a Kind whose tensors compressed-tensors' own compressor writes and reads."""
    kind = name.partition(" ")[0]
    made: Any = SCHEMES[name]
    compressor: Any = BaseCompressor.get_value_from_registry(kind)

    def encode(weight: Tensor) -> dict[str, Tensor]:
        state = {"weight": weight, "weight_scale": scale_for(made, weight)}
        if kind.startswith("nvfp4"):
            whole = LARGEST * 6.0 / weight.abs().max().reshape(1)
            state["weight_global_scale"] = whole
            scales = (state["weight_scale"] * whole).to(E4M3)
            state["weight_scale"] = scales.float()
        return {f".{each}": t for each, t in compressor.compress(state, made).items()}

    def decode(tensors: dict[str, Tensor]) -> Tensor:
        state = {each[1:]: tensor for each, tensor in tensors.items()}
        if kind.startswith("nvfp4"):
            return nvfp4_decoded(state)
        return compressor.decompress(state, made)["weight"].float()

    group = {"targets": ["Linear"], "weights": made.weights.model_dump(), "format": kind}
    settings = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return Kind(settings, encode, decode, format, exact)


def scale_for(made: QuantizationScheme, weight: Tensor) -> Tensor:
    arguments: Any = made.weights
    if arguments.strategy == "tensor":
        return (weight.abs().max() / LARGEST).reshape(1)
    if arguments.strategy == "channel":
        return weight.abs().amax(1, keepdim=True) / LARGEST
    if arguments.strategy == "block":
        return blocks(weight, *arguments.block_structure)[0] / LARGEST
    grid = blocks(weight, 1, arguments.group_size)[0] / 6.0
    if arguments.group_size == 32:
        return torch.exp2(torch.ceil(torch.log2(grid)))
    return grid


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

KINDS: dict[str, Kind] = {
    "fp8": Kind(FP8, fp8_tensors, fp8_decoded, "fp8_e4m3"),
    "fp8, powers of two": Kind(
        FP8 | {"scale_fmt": "ue8m0"}, fp8_power_tensors, fp8_decoded, "fp8_e4m3"
    ),
    "fp8, e5m2": Kind(FP8, e5m2_tensors, fp8_decoded, "fp8_e5m2"),
    "fp8, tensors": Kind(
        FP8 | {"weight_block_size": None}, fp8_whole_tensors, fp8_decoded, "fp8_e4m3"
    ),
    "fp8, 4 bits": Kind(FP8 | {"expert_dtype": "fp4"}, fp4_tensors, fp8_decoded, "mxfp4"),
    "float-quantized, rows": compressed("float-quantized channel"),
    "float-quantized, tensors": compressed("float-quantized tensor"),
    "float-quantized, blocks": compressed("float-quantized block"),
    "nvfp4-pack-quantized": compressed("nvfp4-pack-quantized", exact=False, format="nvfp4"),
    "mxfp4-pack-quantized": compressed("mxfp4-pack-quantized", format="mxfp4"),
    "modelopt, nvfp4": Kind(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        *(modelopt_tensors, modelopt_decoded, "nvfp4"),
    ),
    "modelopt, fp8": Kind(
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        *(whole_tensors, whole_decoded, "fp8_e4m3"),
    ),
    "mxfp4": Kind(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        *(mx_tensors, mx_decoded, "mxfp4"),
        merged=True,
    ),
    **INTEGERS,
}


def written(folder: Path, model: Any, kind: Kind, excluded: tuple[str, ...] = ()) -> Any:
    """Return `model` with the decoded weights, and write its quantised checkpoint of two shards to
    `folder`.

    excluded: parts of the names of modules that are stored as they are, beside the head.
    """
    model.save_pretrained(folder / "dense")
    file = folder / "dense" / "model.safetensors"
    stored, decoded = {}, {}
    for name, tensor in load_file(file).items():
        kept = any(part in name for part in excluded) or tensor.shape[-1] % 32
        if kept or not _is_quantised(name, model, kind):
            stored[name] = decoded[name] = tensor
            continue
        weight = tensor.transpose(1, 2) if kind.merged else tensor
        parts = kind.encode(weight)
        stored |= {name.removesuffix(".weight") + end: part for end, part in parts.items()}
        made = kind.decode(dict(parts))
        decoded[name] = (made.transpose(1, 2) if kind.merged else made).contiguous()
    save_file(decoded, file, {"format": "pt"})
    save_sharded(folder, stored)
    config = json.loads((folder / "dense" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": kind.settings}))
    return type(model).from_pretrained(folder / "dense", dtype=torch.float32)


def _is_quantised(name: str, model: Any, kind: Kind) -> bool:
    if kind.merged:
        return name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    modules = dict(model.named_modules())
    stem = name.removesuffix(".weight")
    is_linear = type(modules.get(stem)) is nn.Linear and stem != "lm_head"
    return name.endswith(".weight") and (is_linear or ".experts." in name)


def save_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write two shards and their index; neighbours in the order of names go to different ones."""
    places = {}
    for i in range(2):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = {name: tensors[name].clone() for name in sorted(tensors)[i::2]}
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def saved_by_transformers(folder: Path, model: Any, config: Any, **options: Any) -> Any:
    """Return `model` quantised by stock transformers while loading, and saved in `folder`."""
    model.save_pretrained(folder / "dense")
    stock = type(model).from_pretrained(
        folder / "dense", quantization_config=config, dtype=torch.float32
    )
    stock.save_pretrained(folder, **options)
    return stock
