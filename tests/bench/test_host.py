"""The host's part of a step: what counts as a launch, a tiny run, and the report of results."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from bench.host.calls import LAYERS
from bench.host.launches import torch_launches
from bench.host.settings import LLAMA, MIXTURE
from bench.host.table import calls_section, replays_section, section
from bench.host.worker import Trainee, launches
from bench.peers.contenders import OURS, STOCK, STOCK_COMPILED
from tests.bench.compiled import run


@pytest.fixture(autouse=True)
def unfilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling fresh memory, as tests do, would count as launches."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def test_operators_that_start_a_kernel_are_counted() -> None:
    x, linear = torch.randn(4, 8), nn.Linear(8, 8)

    def work() -> None:
        y = linear(x.view(2, 2, 8)).transpose(0, 1)
        torch.cat([y, y]).sum().item()
        x.to(x.dtype).contiguous().reshape(-1)
        heads = x.view(1, 1, 4, 8)
        nn.functional.scaled_dot_product_attention(heads, heads, heads)

    outside, inside = torch_launches(work)
    assert not inside
    assert outside.total() == 4
    assert outside["aten::cat"] == 1


@pytest.mark.parametrize("tiny", [LLAMA, MIXTURE], ids=lambda tiny: tiny.name)
def test_a_stock_step_is_measured(tiny: Any) -> None:
    pytest.importorskip("bitsandbytes")
    trainee = Trainee(STOCK, tiny, layers=1)
    assert min(trainee.step()) > 0
    found = launches(trainee, None)
    assert found["triton"] == 0
    assert not found["inside"]
    # Each Linear's base product and adapter, and the gradients of both.
    linears = sum(name.endswith("lora_A") for name, _ in trainee.model.named_modules())
    assert sum(found["outside"].values()) > 8 * linears


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = run("tests.bench.host_calls")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_fused_call_is_split_into_layers(found: dict[str, Any]) -> None:
    forward, backward = found["calls"]
    assert (forward["direction"], backward["direction"]) == ("forward", "backward")
    for each in found["calls"]:
        assert each["choice"].startswith("tail")
        assert 1 <= each["triton"] <= 8
        assert sum(each["layers"].values()) == pytest.approx(each["whole"])
        assert min(each["layers"][name] for name in LAYERS[1:4]) > 0
    # Every timing runs each of the three functions that launch, in batches, after warming up.
    launched = forward["triton"] + backward["triton"]
    assert found["launched"] % launched == 0
    assert found["launched"] > 100 * launched
    assert "| o, backward |" in "\n".join(calls_section(found["calls"]))


def runs(ours: float) -> dict[str, Any]:
    launched = {"triton": 80, "inside": {"aten::cat": 4}, "outside": {"aten::mm": 9}}
    seconds = {OURS: ours, STOCK: 0.02, STOCK_COMPILED: 0.01}
    return {n: {"seconds": [each] * 7, "launches": launched} for n, each in seconds.items()}


def test_targets_are_judged() -> None:
    text = "\n".join(section(LLAMA.name, 2, runs(0.004)))
    assert f"| {STOCK} | 20.00 | 80 | 4 | 9 |" in text
    assert f"time / {STOCK_COMPILED}: 0.40 (0.40 to 0.40), target 0.45: met" in text
    assert "a layer: 40 + 2, target 60: met" in text
    text = "\n".join(section(MIXTURE.name, 1, runs(0.007)))
    assert "target 0.6: not met" in text
    assert "a layer: 80 + 4" in text


def test_replays_are_judged_by_the_worst() -> None:
    each = {"name": "o", "direction": "forward", "replayed": 8.0, "empty": 2.0}
    text = "\n".join(replays_section([each, each | {"direction": "backward", "replayed": 13.0}]))
    assert "| o, forward | 8.0 | 2.0 | 4.0 |" in text
    assert "at most 6.5, target 6: not met" in text
