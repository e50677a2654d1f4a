"""Writing a merged model: plain safetensors, shard by shard, that stock transformers loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_compile.hf.merging.dense_layer import Weights
from qlora_compile.hf.merging.merged_tensors import MergedTensors
from qlora_compile.hf.saving.folders.folder_format import named
from qlora_compile.hf.saving.replacement import replaced
from qlora_compile.hf.saving.save import ADAPTERS, other_files, write_configs
from qlora_compile.hf.saving.shards import Shards, size_in_bytes
from qlora_compile.saving_errors import BaseFolderError, DtypeError

ORIGIN = "merged_from.json"
"""The file that says what a merged model was merged from."""

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
    origin: Mapping[str, str | None] | None = None,
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
    is_other = other_files(output, _STEM)

    def stays(path: Path) -> bool:
        # The adapters may be those that are merged here.
        return path.name == ADAPTERS or (is_other(path) and path.name != ORIGIN)

    with replaced(output, stays) as fresh:
        shards = Shards(fresh, _STEM, limit, single=True)
        for name, tensor in tensors:
            shards.add(name, tensor)
        shards.finish()
        write_configs(base, fresh, config=tensors.config, dtype=named(dtype))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(fresh))
        if origin is not None:
            (fresh / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    return tensors


def origin_of_run(adapter: Path, output: Path, **overridden: str | None) -> dict[str, str | None]:
    """Return what ORIGIN says of a model in `output` that the adapter of a run was merged into.

    overridden: what was given in place of what the run says, by the names of its settings.
    """
    adapter, output = adapter.resolve(), output.resolve()
    try:
        path = os.path.relpath(adapter, output)
    except ValueError:  # another drive of Windows
        path = str(adapter)
    return {"adapter": path, **overridden}
