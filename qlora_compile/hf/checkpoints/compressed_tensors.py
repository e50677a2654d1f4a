"""Checkpoints of compressed-tensors, as llm-compressor and vLLM's tools write them.

The names of tensors are those of `compressed_tensors.compressors`, 0.20. Each layout of a weight is
known by its tensors, since a model may mix several ("mixed-precision").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.checkpoints.folder import CheckpointFolder
from qlora_compile.hf.checkpoints.source import FLOATS, Settings, Source, StoredWeight, stems
from qlora_compile.hf.packings import compressed_floats, pack_quantized
from qlora_compile.hf.packings.fp8 import FORMATS
from qlora_compile.kernels.formats.microscaling import NVFP4

_REMEDY = "load the model with compressed-tensors and save it dequantised"


class CompressedTensorsCheckpoint(Source):
    method: ClassVar[str] = "compressed-tensors"
    beside: ClassVar[tuple[str, ...]] = (
        *(".input_scale", ".input_global_scale", ".input_zero_point", ".output_scale"),
        *(".k_scale", ".v_scale", ".q_scale"),
    )

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        sparse = (settings.get("sparsity_config") or {}).get("format") or "dense"
        for name, value, known in (
            ("sparsity_config.format", sparse, sparse == "dense"),
            ("transform_config", "a transform", not settings.get("transform_config")),
        ):
            if not known:
                raise StoredWeightError(
                    tensor="quantization_config",
                    problem=f"{name} is {value}, with which nothing here computes",
                    remedy=_REMEDY,
                )
        for layout in LAYOUTS:
            yield from layout(folder, settings)


def weight_arguments(settings: Settings, module: str) -> Mapping[str, Any]:
    """Return the settings' arguments for quantising a module's weight; empty if no group has it.

    A group's targets are names, patterns after "re:", or classes; here every module counts as
    "Linear". Names and patterns go before classes. Raises StoredWeightError.
    """
    found: Mapping[str, Any] = {}
    try:
        for group in (settings.get("config_groups") or {}).values():
            for target in group.get("targets") or ():
                if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                    return group.get("weights") or {}
                if target == "Linear":
                    found = group.get("weights") or {}
    except (AttributeError, TypeError, re.error) as error:
        raise StoredWeightError(
            tensor="quantization_config",
            problem=f"config_groups cannot be read ({error})",
            remedy="download config.json again",
        ) from error
    return found


def _float_quantized(folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
    """A float8 "weight" [N, K] beside "weight_scale": [1] for the tensor, [N, 1] for each row, or a
    grid for blocks and groups."""
    for stem in stems(folder, ".weight_scale"):
        name, scales = f"{stem}.weight", f"{stem}.weight_scale"
        if name not in folder.tensors or folder.tensors[name].dtype not in FORMATS:
            continue
        n, k = folder.check(name, shape=(None, None))
        arguments = weight_arguments(settings, stem)
        block = compressed_floats.block_of(arguments)
        stored = folder.check(scales, dtypes=FLOATS)
        if block is not None:
            folder.check(scales, shape=(-(-n // block[0]), -(-k // block[1])))
        elif stored not in ((), (1,)):
            folder.check(scales, shape=(n, 1))
        pack = partial(compressed_floats.packed, arguments=arguments)
        yield StoredWeight(name, {"codes": name, "scales": scales}, (n, k), pack)


def _float_packed(folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
    """A uint8 "weight_packed" [N, K / 2] beside "weight_scale": float8 [N, K / 16] and a
    "weight_global_scale" [1] for NVFP4, bytes e8m0 [N, K / 32] for MXFP4."""
    for stem in stems(folder, ".weight_packed"):
        codes, scales = f"{stem}.weight_packed", f"{stem}.weight_scale"
        if folder.tensors[codes].dtype != torch.uint8:
            continue
        n, half = folder.check(codes, shape=(None, None))
        tensors = {"codes": codes, "scales": scales}
        arguments = weight_arguments(settings, stem)
        quant_format = compressed_floats.format_of_4_bits(arguments)
        dtype = torch.uint8
        if quant_format is NVFP4:
            dtype = torch.float8_e4m3fn
            tensors["global_scale"] = f"{stem}.weight_global_scale"
            folder.check(tensors["global_scale"], dtypes=(torch.float32,), shape=(1,))
        folder.check(scales, dtypes=(dtype,), shape=(n, -(-2 * half // quant_format.size)))
        pack = partial(compressed_floats.packed, arguments=arguments)
        yield StoredWeight(f"{stem}.weight", tensors, (n, 2 * half), pack)


def _pack_quantized(folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
    """An int32 "weight_packed" [N, K * bits / 32] beside "weight_shape", [N, K], "weight_scale"
    and, where zero points differ, "weight_zero_point", int32 [N * bits / 32, groups]."""
    for stem in stems(folder, ".weight_packed"):
        codes, shape = f"{stem}.weight_packed", f"{stem}.weight_shape"
        if folder.tensors[codes].dtype != torch.int32:
            continue
        folder.check(shape, dtypes=(torch.int32, torch.int64), shape=(2,))
        n, k = folder.read(shape).tolist()
        scheme = pack_quantized.IntegerScheme.read(weight_arguments(settings, stem))
        folder.check(codes, shape=(n, -(-k * scheme.bits // 32)))
        yield _integers(folder, stem, {"codes": codes, "shape": shape}, (n, k), scheme)


def _int_quantized(folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
    """An int8 "weight" [N, K] beside "weight_scale"."""
    for stem in stems(folder, ".weight_scale"):
        name = f"{stem}.weight"
        if name in folder.tensors and folder.tensors[name].dtype == torch.int8:
            n, k = folder.check(name, shape=(None, None))
            scheme = pack_quantized.IntegerScheme.read(weight_arguments(settings, stem))
            yield _integers(folder, stem, {"codes": name}, (n, k), scheme)


def _integers(
    folder: CheckpointFolder,
    stem: str,
    tensors: dict[str, str],
    shape: tuple[int, int],
    scheme: pack_quantized.IntegerScheme,
) -> StoredWeight:
    """Return the weight `stem` of integers, with its scales, zero points and groups checked."""
    (n, k), groups = shape, scheme.groups(shape[1])
    tensors = tensors | {"scales": f"{stem}.weight_scale"}
    if folder.check(tensors["scales"], dtypes=FLOATS) not in ((), (1,)):
        folder.check(tensors["scales"], shape=(n, groups))
    if not scheme.symmetric:
        tensors["zeros"] = f"{stem}.weight_zero_point"
        stored = folder.check(tensors["zeros"], dtypes=(torch.int32, torch.int8))
        if folder.tensors[tensors["zeros"]].dtype == torch.int32:
            folder.check(tensors["zeros"], shape=(-(-n * scheme.bits // 32), groups))
        elif stored not in ((), (1,)):
            folder.check(tensors["zeros"], shape=(n, groups))
    if (index := f"{stem}.weight_g_idx") in folder.tensors:
        folder.check(index, dtypes=(torch.int32, torch.int64), shape=(k,))
        tensors["index"] = index
    pack = partial(pack_quantized.packed, shape=shape, scheme=scheme)
    return StoredWeight(f"{stem}.weight", tensors, shape, pack)


Layouts = tuple[Callable[[CheckpointFolder, Settings], Iterator[StoredWeight]], ...]

LAYOUTS: Layouts = (_float_quantized, _float_packed, _pack_quantized, _int_quantized)
"""The readers of weights, each of which yields those stored in its own way."""
