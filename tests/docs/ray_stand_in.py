"""What examples/with_ray.py takes of Ray Train, in one process, for where Ray is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

RESULTS: list[dict[str, Any]] = []


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    num_workers: int
    use_gpu: bool


class TorchTrainer:
    def __init__(
        self,
        train_loop_per_worker: Callable[[dict[str, Any]], None],
        *,
        train_loop_config: dict[str, Any],
        scaling_config: ScalingConfig,
    ) -> None:
        assert isinstance(scaling_config, ScalingConfig)
        self.work = lambda: train_loop_per_worker(train_loop_config)

    def fit(self) -> Any:
        dist.init_process_group("gloo")
        self.work()
        dist.destroy_process_group()
        return SimpleNamespace(metrics=RESULTS[-1])


def use_stand_in(patched: pytest.MonkeyPatch) -> None:
    """Have `import ray` find this, unless Ray is installed."""
    if importlib.util.find_spec("ray") is not None:
        return
    modules: Any = {name: ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch")}
    modules["ray"].train = train = modules["ray.train"]
    train.torch = modules["ray.train.torch"]
    train.report = RESULTS.append
    train.ScalingConfig = ScalingConfig
    train.get_context = lambda: SimpleNamespace(get_world_rank=dist.get_rank)
    train.torch.TorchTrainer = TorchTrainer
    train.torch.get_device = lambda: torch.device("cpu")
    for name, module in modules.items():
        patched.setitem(sys.modules, name, module)
