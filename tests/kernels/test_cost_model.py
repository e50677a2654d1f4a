"""The cost model against measurements, and against published switch-over points."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench.tuning.ranking import LOOKED_AT, RESULTS, problem_set, ranked
from qlora_compile.kernels.device_model import DEVICE_MODELS, CpuModel
from qlora_compile.kernels.gpu.configs import GemmConfig
from qlora_compile.kernels.gpu.target import assuming
from qlora_compile.kernels.problem import Direction
from qlora_compile.kernels.registry import VARIANTS
from qlora_compile.kernels.variants import native_adapter
from tests.kernels.test_selection import TYPICAL

DENSE, FUSED = (next(v for v in VARIANTS if v.name == name) for name in ("dense", "fused"))

NEVER = 1 << 15


def test_the_fastest_on_a_cpu_is_among_the_models_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the medians of bench/tuning/ranking.py, with the figures of the CPU it ran on, which had
    products in bfloat16."""
    monkeypatch.setattr(native_adapter, "multiplies", lambda dtype: dtype != torch.float16)
    figures = json.loads(RESULTS.read_text())
    cpu = CpuModel.from_json(figures["cpu"])
    rows = [ranked(problem, cpu, figures["seconds"][str(problem)]) for problem in problem_set()]
    assert len(rows) == 96
    measured = [len(figures["seconds"][row.problem]) for row in rows]
    # With fewer candidates than that there would be nothing to miss.
    assert sum(count > LOOKED_AT for count in measured) > len(rows) / 3
    hits = sum(row.position < LOOKED_AT for row in rows)
    assert hits >= 0.9 * len(rows)
    first = sum(row.position == 0 for row in rows)
    assert first >= 0.6 * len(rows)


def switch_over(card: str, direction: Direction) -> int:
    """Return the most rows at which decoding in the loop costs no more than dequantise + vendor
    GEMM; NEVER or more if there is no limit."""
    model = next(each for each in DEVICE_MODELS if each.name == card)
    last = 0
    with assuming(model.target, kind="cuda"):
        for m in range(16, 2 * NEVER, 16):
            problem = replace(TYPICAL, m=m, direction=direction)
            seconds = {
                variant: min(variant.cost(problem, c, model) for c in variant.configs(problem))
                for variant in (DENSE, FUSED)
            }
            if seconds[FUSED] > seconds[DENSE]:
                break
            last = m
    return last


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("card", "published"),
    [("A100", 450), ("H100", 1100), ("H200", 700), ("B200", 400), ("RTX 4090", None)],
)
def test_switch_over_points_are_reproduced(
    card: str, published: int | None, direction: Direction
) -> None:
    """Published for K = 4096, rank 16; None: decoding in the loop never loses."""
    found = switch_over(card, direction)
    if published is None:
        assert found >= NEVER
    else:
        assert published / 2 <= found <= published * 2


def test_few_columns_are_split_and_many_are_not() -> None:
    """So that there are as many programs as multiprocessors."""
    skinny = next(v for v in VARIANTS if v.name == "skinny")
    model = next(each for each in DEVICE_MODELS if each.name == "H100")
    splits = []
    for n in (256, 4096, 1 << 17):
        problem = replace(TYPICAL, m=8, layout=TYPICAL.layout.with_rows(n))
        with assuming(model.target, kind="cuda"):
            configs = skinny.configs(problem)
        best = min(configs, key=lambda config: skinny.cost(problem, config, model))
        assert isinstance(best, GemmConfig)
        splits.append(best.splits)
    assert splits[0] > splits[1] >= splits[2] == 1
