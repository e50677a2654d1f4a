"""merge: writes a model with its adapters merged, and measures how far it is from the original."""

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
    """What `merge` has written and measured; None stands for what was not asked for.

    tokens: how many tokens were measured on, 0 for none. trained_loss: the loss of the trained
    model, in nats per token. base, merged, repacked: the Distance from the trained model of the
    model without adapters, of the written one, and of the written one packed again. repacking:
    ‖packed - merged‖ / ‖merged - base‖ of the weights that the adapters changed.
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
    origin: Mapping[str, str | None] | None = None,
    **format_options: Any,
) -> MergeReport:
    """Write `model` with its adapters merged as plain safetensors that stock transformers loads.

    Adapters are merged into the base that they were trained on: the dequantised weights, not those
    from before quantisation. Each weight is merged in float32 and rounded to `dtype` once. One
    weight is made at a time and one shard held in memory; the model itself does not change.
    The folder is replaced as a whole, as by `qlora_compile.save`.

    model: a PeftModel over a transformers model, packed or not, optimised or not. A model without
    adapters is written dequantised.

    adapters: the name of an adapter, or several names with weights, by which their scalings are
    multiplied; None for the active adapters, each in full.

    tokenizer: written beside the model. If given, the distance of the written model from the
    trained one is measured, on 2,048 tokens of `texts` or else of docstrings of Python's standard
    library. For this the written model is loaded whole.

    format: a format to pack the written model in, in memory, with its `format_options`, to measure
    the error of packing: relative to what the adapters changed and, with a tokenizer, in loss.

    max_shard_size: the largest size of a file, in bytes or as text such as "5GB".

    origin: written to merged_from.json, by which `qlora-compile verify --merged` finds what to
    compare the merged model with: the path of the adapter's folder from `output`, as "adapter".

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
            raise SpreadModelError(
                model=type(model).__name__,
                problem="one alone, which merges, cannot call the model to measure",
                remedy="pass no tokenizer, and save it by its save_pretrained",
            )
        sequences = _sequences(model, tokenizer, texts)
    elif texts is not None:
        raise TokenizerMissingError(site="texts")
    chosen: Any = {"dtype": dtype, "weights": weights, "origin": origin}
    chosen["max_shard_size"] = max_shard_size
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
