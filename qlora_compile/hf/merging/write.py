"""Writing a merged model: plain safetensors, shard by shard, that stock transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_compile.hf.merging.dense_layer import Weights
from qlora_compile.hf.merging.merged_tensors import MergedTensors
from qlora_compile.hf.saving.folders.folder_format import named
from qlora_compile.hf.saving.replacement import replaced
from qlora_compile.hf.saving.save import other_files, write_configs
from qlora_compile.hf.saving.shards import Shards, size_in_bytes
from qlora_compile.saving_errors import BaseFolderError, DtypeError

_STEM = "model"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def write_merged(
    model: nn.Module,
    output: Path,
    *,
    dtype: torch.dtype,
    weights: Weights | None,
    max_shard_size: int | str,
    tokenizer: Any = None,
) -> MergedTensors:
    """Write `model` merged, and return what was written; arguments and errors are those of
    `qlora_compile.merge`."""
    if dtype not in _DTYPES:
        raise DtypeError(value=dtype, known=", ".join(map(named, _DTYPES)))
    limit = size_in_bytes(max_shard_size)
    tensors = MergedTensors(model, dtype, weights)
    base = tensors.base
    if output.is_dir() and Path(base.config.name_or_path or "").resolve() == output.resolve():
        raise BaseFolderError(value=str(output))
    with replaced(output, other_files(output, _STEM)) as fresh:
        shards = Shards(fresh, _STEM, limit, single=True)
        for name, tensor in tensors:
            shards.add(name, tensor)
        shards.finish()
        write_configs(base, fresh, config=tensors.config, dtype=named(dtype))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(fresh))
    return tensors
