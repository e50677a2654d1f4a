"""From a packed folder through training to every folder that comes of it, each read elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

import qlora_compile
from tests.test_equality import without_inductor
from tests.toy_models import toy

__all__ = ["without_inductor"]
ROOT = Path(__file__).parents[1]
MODULE = "tests.saved_everywhere"
IDS = torch.arange(3, 35).view(2, 16)


def read_elsewhere(mode: str, folder: Path, adapter: Path | str, output: Path) -> Tensor:
    command = [sys.executable, "-m", MODULE, mode, str(folder), str(adapter), str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return load_file(output)["logits"]


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_attn_implementation"),
    reason="transformers before 5.18 has no hook by which a quantizer names its files",
)
@pytest.mark.usefixtures("without_inductor")
def test_packed_trained_saved_merged_and_read_in_other_processes(tmp_path: Path) -> None:
    packed, adapter, merged = (tmp_path / name for name in ("packed", "adapter", "merged"))
    qlora_compile.optimize(toy(num_hidden_layers=1), quantize="int8").save_pretrained(
        tmp_path / "first"
    )
    base = qlora_compile.load(tmp_path / "first", dtype=torch.float32)
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
        trained = model.eval()(IDS).logits
    model.save_pretrained(str(adapter))
    qlora_compile.save(model, packed)
    qlora_compile.merge(model, merged, torch.float32)
    # Two orders of float32 sums.
    output = tmp_path / "logits.safetensors"
    assert distance(read_elsewhere("with", packed, adapter, output), trained) < 1e-5
    assert distance(read_elsewhere("without", merged, "", output), trained) < 1e-5
    with model.disable_adapter(), torch.no_grad():
        assert distance(model(IDS).logits, trained) > 1e-3
