"""The process of one contender: builds it, then obeys orders, a JSON line each."""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench.allocations import allocations
from bench.gpu_memory import on_gpu
from bench.peers.answers import answers
from bench.peers.contenders import CONTENDERS
from bench.peers.floor import Floor
from bench.peers.settings import LEARNING_RATE, Setting, base_model, data
from qlora_compile.kernels import workspace


@dataclass
class Trainee:
    """One contender in training."""

    model: Any
    batches: list[Tensor]
    setting: Setting
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.train().parameters() if p.requires_grad]
        # What the HF Trainer takes by default.
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    def forward(self, index: int) -> Tensor:
        ids = self.batches[index % len(self.batches)]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.setting.autocast):
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def step(self, index: int) -> float:
        loss = self.forward(index)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def describe(self) -> dict[str, float]:
        """Return the bytes of a step, beyond weights, adapters and the optimiser's state, and its
        operators; on a GPU its kernels, their seconds, and all bytes allocated. The scratch memory
        that qlora_compile keeps from step to step counts as the step's."""
        gc.collect()
        # The first step has made what is made once.
        if self.setting.device == "cpu":
            saved = allocations(lambda: self.forward(0), warm=False).held
            step = allocations(lambda: self.step(0), warm=False)
            scratch = sum(buffer.nbytes for buffer in workspace._buffers.by_stream.values())
            return {"peak": step.most + scratch, "saved": saved, "launched": _leaves(step.events)}
        saved = on_gpu(lambda: self.forward(0)).held
        step = on_gpu(lambda: self.step(0))
        return {
            "peak": step.most - self.kept_bytes,
            "saved": saved,
            "launched": step.kernels,
            "device_seconds": step.seconds,
            "allocated": step.most,
        }

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of weights, adapters and the optimiser's state."""
        states = self.optimizer.state.values()
        kept = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return stored_bytes(self.model) + sum(t.nbytes for t in kept)


def _leaves(events: Any) -> int:
    """Return how many operators, torch's or others, ran without calling another."""
    count = 0
    for event in events:
        inner = _leaves(event.children)
        count += inner or (event.tag.name == "TorchOp" and "::" in event.name)
    return count


def stored_bytes(model: Any) -> int:
    """Return the bytes of all parameters and buffers, each memory once."""
    tensors = [part for t in (*model.parameters(), *model.buffers()) for part in _plain(t)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a tensor subclass, such as torchao's, holds."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [t for name in tensor.__tensor_flatten__()[0] for t in _plain(getattr(tensor, name))]


def main(results: IO[str]) -> None:
    """Answer orders until there are no more."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    order = json.loads(sys.stdin.readline())
    setting = Setting(**order["setting"])
    contender = CONTENDERS[order["contender"]]
    if contender.without_target and sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("900")
    batches = data(setting, order["batches"])
    model = base_model(setting)
    torch.manual_seed(0)  # of the adapters' initialisation
    start = time.perf_counter()
    built = contender.build(model, setting)
    trainee = built if isinstance(built, Floor) else Trainee(built, batches, setting)
    del model
    answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
    if isinstance(trainee, Trainee):
        answer["stored"] = stored_bytes(trainee.model)
    print(json.dumps(answer), file=results, flush=True)
    for line in sys.stdin:
        what, index = json.loads(line)
        start = time.perf_counter()
        answer = {"loss": None}
        if what == "describe":
            answer = trainee.describe() if isinstance(trainee, Trainee) else {}
        elif isinstance(trainee, Trainee):
            answer = {"loss": trainee.step(index)}
        else:
            trainee()
        if setting.device != "cpu":
            torch.cuda.synchronize()
        answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), file=results, flush=True)


if __name__ == "__main__":
    main(answers())
