"""merge: writes a model with its adapters merged, and measures how far it is from the trained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_compile.errors import TokenizerMissingError
from qlora_compile.hf import loading
from qlora_compile.hf.merging.distance import (
    Distance,
    distances,
    evaluating,
    logits_of,
    logits_without_adapters,
    repacking_error,
)
from qlora_compile.hf.merging.merged_tensors import MergedTensors
from qlora_compile.hf.merging.write import write_merged
from qlora_compile.hf.saving.shards import USUAL_SIZE
from qlora_compile.hf.saving.whole_weights import is_spread, whole_weights
from qlora_compile.quantizer import QloraCompileConfig
from qlora_compile.saving_errors import SpreadModelError
from qlora_compile.text_table import text_table
from qlora_compile.training.demo import docstring_documents
from qlora_compile.training.documents import Document
from qlora_compile.training.token_sequences import token_sequences

_SEQUENCES, _LENGTH = 8, 256


@dataclass(frozen=True)
class MergeReport:
    """What `merge` has written and measured.

    tokens: of the text that was measured on, 0 if nothing was. trained_loss: of the model that was
    merged, in nats per token. base, merged, repacked: the Distance of the model without adapters,
    of the written one and of that packed again. repacking: ‖packed - merged‖ / ‖merged - base‖ of
    the weights that the adapters changed. None is what was not asked for.
    """

    output: Path
    dtype: torch.dtype
    tokens: int = 0
    trained_loss: float | None = None
    base: Distance | None = None
    merged: Distance | None = None
    repacked: Distance | None = None
    repacking: float | None = None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        lines = [f"merged in {name}: {self.output}"]
        if self.trained_loss is None:
            return f"{lines[0]}\nnot measured: pass a tokenizer"
        rows = [("trained", "", "", f"{self.trained_loss:.4f}")]
        models = {"without adapters": self.base, "merged": self.merged, "repacked": self.repacked}
        for label, each in models.items():
            if each is not None:
                numbers = f"{each.logits:.2e}", f"{each.divergence:.2e}", f"{each.loss:.4f}"
                rows.append((label, *numbers))
        header = ("model", "logits", "divergence", "loss")
        lines += [f"distance from the trained model on {self.tokens} tokens:"]
        lines += text_table(header, rows)
        if self.repacking is not None:
            lines.append(
                f"packing the merged weights again moves them by {self.repacking:.2f} of what the "
                "adapters changed"
            )
        return "\n".join(lines)


def merge(
    model: nn.Module,
    output: str | os.PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
    *,
    adapters: str | Mapping[str, float] | None = None,
    tokenizer: Any = None,
    texts: Iterable[str] | None = None,
    format: str | None = None,
    max_shard_size: int | str = USUAL_SIZE,
    **format_options: Any,
) -> MergeReport:
    """Write `model` with its adapters merged as plain safetensors that stock transformers loads.

    Adapters are merged onto the base that they were trained on, that is the dequantised one: not
    onto the weights that it was quantised from. Each weight is merged in float32 and rounded to
    `dtype` once. One weight is made at a time and one shard held; the model itself does not change.
    The folder is replaced as a whole, as by `qlora_compile.save`.

    model: a PeftModel over a transformers model, packed or not, optimised or not. Without adapters
    it is written dequantised.

    adapters: the name of an adapter, or several with their weights, which factor their scalings;
    None for the active ones, each in full.

    tokenizer: written beside the model; with it the distance between the written model and the
    trained one is measured, on `texts` or else on docstrings of Python's standard library, 2,048
    tokens. For that the written model is loaded whole.

    format: a format to pack the written model in, in memory, with its `format_options`, to measure
    what that costs: relative to what the adapters changed, and with a tokenizer in loss.

    max_shard_size: of each file, in bytes or as text such as "5GB".

    If the weights of `model` are spread over processes, as by FSDP2 or ZeRO-3, all of them call
    this, without a tokenizer. Process 0 gathers the packed weights in its memory and writes.

    Raises, before anything is written:
        SavedModelTypeError, MergedWeightsError, MissingTensorError: the model cannot be written.
        UnknownAdapterError: it has no adapter of that name.
        SpreadModelError: its weights are spread over processes, and there is a tokenizer.
        DtypeError, ShardSizeError, TokenizerMissingError, an error of the format: an argument
        cannot be used.
        OutputDirectoryError, RivalWeightsError, BaseFolderError: the folder cannot be written.
    Raises, leaving what was there before:
        UnmergeableError: an adapter cannot be merged into a plain weight.
        UnfinishedSaveError: writing has failed.
    """
    packing = None if format is None else QloraCompileConfig(format, **format_options)
    weights = {adapters: 1.0} if isinstance(adapters, str) else adapters
    path = Path(output)
    sequences: list[list[int]] = []
    if tokenizer is not None:
        if is_spread(model):
            raise SpreadModelError(model=type(model).__name__)
        sequences = _sequences(model, tokenizer, texts)
    elif texts is not None:
        raise TokenizerMissingError(site="texts")
    chosen = {"dtype": dtype, "weights": weights, "max_shard_size": max_shard_size}
    report: dict[str, Any] = {"output": path, "dtype": dtype}
    with whole_weights(model) as writes:
        if writes:
            tensors = write_merged(model, path, tokenizer=tokenizer, **chosen)
            report |= _measured(model, tensors, path, dtype, packing, sequences)
    return MergeReport(**report)


def _measured(
    model: nn.Module,
    tensors: MergedTensors,
    path: Path,
    dtype: torch.dtype,
    packing: QloraCompileConfig | None,
    sequences: list[list[int]],
) -> dict[str, Any]:
    """Return fields of MergeReport: what packing the written model costs unless `packing` is None,
    and the distances on `sequences` if there are any. tensors: what was written."""
    report: dict[str, Any] = {}
    device = next(model.parameters()).device
    loaded = type(tensors.base).from_pretrained
    others: dict[str, nn.Module] = {}
    if sequences:
        others["merged"] = loaded(path, dtype=dtype).to(device)
    if packing is not None:
        repacked = loaded(path, dtype=dtype, quantization_config=packing).to(device)
        base = MergedTensors(model, torch.float32, {})
        report["repacking"] = repacking_error(tensors, base, repacked)
        if sequences:
            others["repacked"] = repacked
    if sequences:
        with evaluating(model):
            calls = [logits_without_adapters(model), *map(logits_of, others.values())]
            loss, found = distances(logits_of(model), calls, sequences, device)
        report |= {"trained_loss": loss, "tokens": sum(map(len, sequences))}
        report |= dict(zip(("base", *others), found, strict=True))
    return report


def _sequences(model: Any, tokenizer: Any, texts: Iterable[str] | None) -> list[list[int]]:
    config = model.config
    documents: Sequence[Document] = (
        docstring_documents()[:64]
        if texts is None
        else [Document(f"text {number}", text) for number, text in enumerate(texts)]
    )
    limit = loading.longest_sequence(config)
    length = min(_LENGTH, limit or _LENGTH)
    named = {"data": "texts", "purpose": "measuring"}
    return token_sequences(documents, tokenizer, config, length, **named)[:_SEQUENCES]
