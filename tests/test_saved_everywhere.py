"""From a packed folder through training to every folder that comes of it, each read elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

import qlora_compile
from qlora_compile.hf.merging.write import write_merged
from tests.test_equality import without_inductor
from tests.toy_models import toy

__all__ = ["without_inductor"]
ROOT = Path(__file__).parents[1]
MODULE = "tests.saved_everywhere"
IDS = torch.arange(3, 35).view(2, 16)
FOLDERS = {"qlora_compile": "int8", "bitsandbytes": "nf4"}
"""A format for each kind of folder that models are saved in."""


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def trained(kind: str, folder: Path) -> Tensor:
    """Load a packed model, train it and write all that comes of it; return its logits."""
    packed = qlora_compile.optimize(toy(num_hidden_layers=1), quantize=FOLDERS[kind])
    packed.save_pretrained(folder / "first")
    base = qlora_compile.load(folder / "first", dtype=torch.float32)
    model = qlora_compile.optimize(base, LoraConfig(target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 10.0)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    model.save_pretrained(str(folder / "adapter"))
    assert qlora_compile.save(model, folder / "packed") == kind
    qlora_compile.merge(model, folder / "merged", torch.float32)
    unmerged: Any = {"dtype": torch.float32, "weights": {}, "max_shard_size": "5GB"}
    write_merged(model, folder / "dense", **unmerged)
    with model.disable_adapter(), torch.no_grad():
        assert distance(model(IDS).logits, logits) > 1e-3
    return logits


@pytest.mark.usefixtures("without_inductor")
def test_packed_trained_saved_merged_and_read_in_other_processes(tmp_path: Path) -> None:
    expected = {kind: trained(kind, tmp_path / kind) for kind in FOLDERS}
    ours, theirs = (tmp_path / kind for kind in FOLDERS)
    read = {
        "with": [
            *(("load", each / "packed", each / "adapter") for each in (ours, theirs)),
            ("stock", ours / "packed", ours / "packed" / "adapter"),
        ],
        "without": [
            *(("stock", each / "merged", "") for each in (ours, theirs)),
            *(("stock", each / "dense", each / "adapter") for each in (ours, theirs)),
            ("stock", theirs / "packed", theirs / "packed" / "adapter"),
        ],
    }
    if not hasattr(HfQuantizer, "update_attn_implementation"):
        # transformers before 5.18 has no hook by which a quantizer names its files.
        read["with"].pop()
    for mode, models in read.items():
        output = tmp_path / f"{mode}.safetensors"
        given = map(str, (output, *(each for model in models for each in model)))
        command = [sys.executable, "-m", MODULE, mode, *given]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        found = load_file(output)
        assert len(found) == len(models)
        for reader, folder, adapter in models:
            logits = found[f"{reader} {folder} {adapter}"]
            # Two orders of float32 sums.
            assert distance(logits, expected[folder.parent.name]) < 1e-5, (mode, folder)
