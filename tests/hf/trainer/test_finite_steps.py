"""What is looked for and named under engines of several processes when a step meets NaN."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from qlora_compile.hf.trainer.finite_steps import ON_NAN, SKIP, finite_steps
from qlora_compile.training_errors import NotFiniteError, UnskippableStepError


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """This process as a job of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Blocks(nn.Module):
    """Two blocks, of which the second gives NaN; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.blocks[1](self.blocks[0](x) / 0 * 0)


class Trained:
    """The part of transformers' Trainer that looking for NaN needs."""

    def __init__(self, model: Any, is_deepspeed_enabled: bool = False) -> None:
        self.model, self.is_deepspeed_enabled = model, is_deepspeed_enabled
        self.accelerator = SimpleNamespace(scaler=None)
        self.args = SimpleNamespace(world_size=1)
        self.state = SimpleNamespace(global_step=0)

    def training_step(self, model: Any, inputs: Any) -> Tensor:
        loss = model(**inputs).sum()
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize(("engine", "site"), [("none", r"blocks\.1"), ("fsdp2", "the loss")])
def test_only_a_whole_model_is_called_to_name_a_block(engine: str, site: str, group: None) -> None:
    model = Blocks()
    if engine == "fsdp2":
        fully_shard(model)
    trainer = finite_steps(Trained, "stop")(model)
    with pytest.raises(NotFiniteError, match=f"step 1: {site}"):
        trainer.training_step(model, {"x": torch.ones(1, 4)})
    # One process may raise before the others would call the model together.
    assert model.calls == (2 if engine == "none" else 1)


@pytest.mark.parametrize("on_nan", ON_NAN)
@pytest.mark.parametrize("deepspeed", [False, True])
def test_deepspeed_skips_no_step(on_nan: str, deepspeed: bool) -> None:
    trainer = finite_steps(Trained, on_nan)
    if deepspeed and on_nan == SKIP:
        with pytest.raises(UnskippableStepError, match="DeepSpeed"):
            trainer(Blocks(), deepspeed)
    else:
        trainer(Blocks(), deepspeed)
