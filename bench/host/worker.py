"""The process of one contender: trains a tiny model, for the host's time of each step.

Ours runs on an imaginary GPU: its Triton kernels are compiled and launched as usual, but do not
run. All contenders' torch operators run on tiny tensors on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from torch import Tensor
from torch._inductor import config as inductor_config

import qlora_compile
from bench.host.calls import measured_calls
from bench.host.launches import torch_launches
from bench.host.replays import measured_replays
from bench.host.settings import MODELS, TinyModel
from bench.host.sizes import BATCH, LENGTH, VOCABULARY
from bench.host.tail import SPLITS, choose_tail
from bench.peers.answers import answers
from bench.peers.contenders import OURS, STOCK, STOCK_COMPILED
from bench.stock import with_bitsandbytes, without_repacking
from qlora_compile.kernels.gpu import thin_products
from qlora_compile.kernels.plans import native
from qlora_compile.tuning.modes import OFF, tuner_of
from tests.fake_device.device import LAUNCH_SECONDS, FakeDevice, fake_device

WARM_UP = 4
"""Steps, the first of which compile."""


def _ours(model: Any, lora: Any) -> Any:
    return qlora_compile.optimize(model, lora, quantize="nf4", tune=OFF)


def _stock(model: Any, lora: Any) -> Any:
    return get_peft_model(without_repacking(with_bitsandbytes(model, 4)), lora)


def _compiled(model: Any, lora: Any) -> Any:
    return torch.compile(_stock(model, lora))


CONTENDERS: dict[str, Callable[[Any, Any], Any]] = {
    OURS: _ours,
    STOCK: _stock,
    STOCK_COMPILED: _compiled,
}


class Trainee:
    """One contender in training. Forward and backward count; the optimiser's step does not, as it
    is torch's and the same for all."""

    def __init__(self, contender: str, tiny: TinyModel, layers: int) -> None:
        torch.manual_seed(0)
        self.model = CONTENDERS[contender](tiny.build(layers), tiny.lora).train()
        self.ids: Tensor = torch.randint(VOCABULARY, (BATCH, LENGTH))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def step(self) -> tuple[float, float]:
        """Return the CPU seconds of this thread in forward and backward."""
        start = time.thread_time()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        between = time.thread_time()
        loss.backward()
        end = time.thread_time()
        for parameter in self.trained:
            parameter.grad = None
        return between - start, end - between


def launches(trainee: Trainee, device: FakeDevice | None) -> dict[str, Any]:
    """Return the launches of one step: Triton's, and torch's inside and outside of our ops, by
    operator."""
    outside, inside = torch_launches(trainee.step)
    triton = 0
    if device is not None:
        before = device.launched
        trainee.step()
        triton = device.launched - before
    return {"triton": triton, "inside": dict(inside), "outside": dict(outside)}


def main(order: dict[str, Any]) -> None:
    """Answer {"steps": n} with the seconds of n steps, {"calls": n} with those of fused calls."""
    results = answers()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    # Each of Inductor's kernels shows in a profile.
    inductor_config.cpp.enable_kernel_profile = True
    with contextlib.ExitStack() as stack:
        device = None
        if order["contender"] == OURS:
            device = stack.enter_context(fake_device())
            # What is not computed cannot be compared.
            native.install("CPU", compares=False)
            stack.enter_context(mock.patch.object(thin_products, "splits_of", return_value=SPLITS))
        trainee = Trainee(order["contender"], MODELS[order["model"]], order["layers"])
        for _ in range(WARM_UP):
            trainee.step()
            if device is not None:
                tuner = tuner_of(OFF)
                assert tuner is not None
                choose_tail(tuner.selector)
        counted = launches(trainee, device)
        if device is not None:
            device.charge()
        torchs = sum(counted["inside"].values()) + sum(counted["outside"].values())
        charged = torchs * LAUNCH_SECONDS
        print(json.dumps(counted), file=results, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            if "steps" in asked:
                steps = [trainee.step() for _ in range(asked["steps"])]
                answer = {"seconds": [forward + backward + charged for forward, backward in steps]}
            else:
                answer = {"calls": measured_calls(asked["calls"])}
                assert device is not None
                device.charge(0)
                answer["replays"] = measured_replays(asked["calls"])
                device.charge()
            print(json.dumps(answer), file=results, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
