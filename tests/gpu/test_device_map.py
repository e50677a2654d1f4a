"""A model whose layers a `device_map` puts on two devices trains as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import qlora_compile
from qlora_compile import QloraCompileConfig
from tests.toy_models import tokens, toy

TWO = pytest.param(
    ("cuda:0", "cuda:1"),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            torch.cuda.device_count() < 2, reason="needs two CUDA or ROCm devices, torch sees fewer"
        ),
    ],
    id="two",
)
ONE = pytest.param(("cpu", "cpu"), id="one")
FIRST = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1")
SECOND = ("model.layers.2", "model.layers.3", "model.norm", "lm_head")


def loaded(folder: Path, packed: str, device_map: Any) -> Any:
    """Return a model with adapters, packed while it is loaded or afterwards."""
    options: Any = {"quantization_config": QloraCompileConfig("nf4")} if packed == "loading" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **options)
    return qlora_compile.optimize(
        model,
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        quantize=None if options else "nf4",
        tune="model",
    ).train()


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def train(model: Any, device: str) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(3):
        ids = tokens().to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    qlora_compile.save(model, folder)
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("devices", [ONE, TWO])
@pytest.mark.parametrize("packed", ["loading", "afterwards"])
def test_layers_on_two_devices_train_as_on_one(
    packed: str, devices: tuple[str, str], tmp_path: Path
) -> None:
    toy(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    first, second = devices
    places = {**dict.fromkeys(FIRST, first), **dict.fromkeys(SECOND, second)}
    one = loaded(tmp_path / "model", packed, first)
    two = loaded(tmp_path / "model", packed, places)
    found = {str(p.device) for p in two.parameters()}
    assert found == {*devices}
    two.load_state_dict(trained(one), strict=False)
    assert saved(one, tmp_path / "one") == saved(two, tmp_path / "two")
    torch.testing.assert_close(train(two, first), train(one, first), rtol=1e-4, atol=1e-5)
    expected = trained(one)
    for name, weight in trained(two).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    reports = [qlora_compile.explain(each) for each in (one, two)]
    assert reports[0].fused == reports[1].fused == 28
