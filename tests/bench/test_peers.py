"""The comparison with the peers: its floor, and when it reports no speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.measured_on import measured_on
from bench.paired import interval_of_median
from bench.peers import __main__ as peers
from bench.peers.contenders import FLOOR, OURS, STOCK, UNQUANTISED
from bench.peers.floor import Floor
from bench.peers.race import Run
from bench.peers.settings import SETTINGS, STACK, Setting, base_model
from bench.peers.table import disagreement, section, verdicts
from bench.peers.worker import stored_bytes

SMALL = Setting(STACK, 1, 8, layers=2, hidden=64, rank=2)


def runs(loss: float) -> list[Run]:
    seconds = [1.0, 1.1, 0.9, 1.0]
    ours = Run(OURS, first=2.0, peak=50, seconds=seconds, losses=[loss] * 4)
    stock = Run(STOCK, first=1.0, peak=100, seconds=[2 * s for s in seconds], losses=[3.0] * 4)
    return [ours, stock, Run(FLOOR, seconds=[0.9 * s for s in seconds]), Run("lost", failed="why")]


def test_speeds_are_told_where_losses_agree() -> None:
    text = "\n".join(section(SMALL, runs(3.01)))
    assert f"| {STOCK} | 2.000 |" in text
    assert "failed: why" in text
    assert f"time / {STOCK}: 0.500, target 0.72: met" in text
    assert f"peak / {STOCK}: 0.500, target 0.6: met" in text


def test_none_is_told_where_they_do_not() -> None:
    assert disagreement(runs(3.3)) == [f"{OURS}: its losses are 10.0% from those of {STOCK}"]
    assert disagreement(runs(float("nan")))
    text = "\n".join(section(SMALL, runs(3.3)))
    assert "no speed is told" in text
    assert "2.000" not in text
    assert "target" not in text


def test_a_missed_target_is_named() -> None:
    slow = runs(3.0)
    slow[0].seconds = [3.0] * 4
    assert any(line.endswith("target 0.72: not met") for line in verdicts(slow))


def test_one_that_was_lost_on_the_way_is_compared_with_nothing() -> None:
    lost = runs(3.0)
    lost[2].failed, lost[2].seconds = "killed by SIGKILL", [0.1]
    lost.append(Run(UNQUANTISED, seconds=[0.1], losses=[9.0], failed="killed by SIGKILL"))
    assert disagreement(lost) == []
    told = verdicts(lost)
    assert [line.split(":")[0] for line in told] == [f"time / {STOCK}", f"peak / {STOCK}"]


def test_settings_that_did_not_run_keep_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    for setting in (SETTINGS[1], SETTINGS[0], SETTINGS[1]):
        peers.keep([(setting, runs(3.0))])
    text = next(tmp_path.glob("peers*.md")).read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    machine = measured_on()["machine"]
    kind = f"{machine['instructions']}, {machine['processor']}"
    assert titles == [f"## {setting}, {kind}" for setting in SETTINGS[:2]]
    assert text.count("4 steps of each; torch ") == 2


def test_results_of_other_processors_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    for kind in (("amx", "one"), ("avx2", "one"), ("amx", "one"), ("amx", "other")):
        monkeypatch.setattr(peers, "measured_on", lambda kind=kind: on(*kind))
        peers.keep([(SETTINGS[0], runs(3.0))])
    text = (tmp_path / "peers.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    kinds = ("amx, one", "amx, other", "avx2, one")
    assert titles == [f"## {SETTINGS[0]}, {kind}" for kind in kinds]


def on(instructions: str, processor: str) -> dict[str, dict[str, str | int]]:
    machine: dict[str, str | int] = {"processor": processor, "instructions": instructions}
    return {"versions": {}, "machine": machine}


@pytest.mark.parametrize("ours", [False, True])
def test_the_floor_multiplies_what_a_step_has_to(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base_model(SMALL)
    monkeypatch.setattr("bench.peers.floor._faster", lambda torchs, ours: ours)
    floor = Floor(model, SMALL, ours=ours)
    with FlopCounterMode(display=False) as counter:
        floor()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    head = model.get_output_embeddings().weight
    rows, rank = SMALL.tokens, SMALL.rank
    expected = 4 * rows * head.numel()
    for weight in (w for w in weights if w is not head):
        expected += 4 * rows * (weight.numel() + 3 * rank * sum(weight.shape) // 2)
    # Nothing is asked of the input of the first q, k and v.
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(attention, name).weight
        expected -= 2 * rows * (weight.numel() + rank * weight.shape[1])
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(flops for op, flops in counted.items() if "attention" not in str(op))
    assert matrices == expected


def test_a_tied_weight_is_stored_once() -> None:
    layer: Any = nn.ModuleList([nn.Linear(4, 4, False), nn.Linear(4, 4, False)])
    layer[1].weight = layer[0].weight
    assert stored_bytes(layer) == 64


@pytest.mark.parametrize("count", [1, 5, 6, 20])
def test_the_interval_holds_the_median(count: int) -> None:
    values = torch.rand(count).tolist()
    low, high = interval_of_median(values)
    assert low <= sorted(values)[count // 2] <= high
    assert (low, high) == (min(values), max(values)) or count > 6


def test_an_older_commit_is_told_only_what_differs() -> None:
    setting = Setting(STACK, 2, 64, dropout=0.1)
    assert setting.told == {"model": STACK, "batch_size": 2, "length": 64, "dropout": 0.1}
    assert Setting(**setting.told) == setting
