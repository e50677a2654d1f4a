"""One rank of a job: trains toy models under the engines of several processes, and writes results.

Started by torchrun with the file to write, then names of cases (`cases.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager

import qlora_compile
from qlora_compile.capture import backend
from tests.distributed.cases import LEARNING_RATE, STEPS, Case, batch, model_of


def compile_inner(graph: Any, inputs: Any, *_: Any) -> Any:
    """Run graphs as they are: other tests compile, and a job would do so once for each rank."""
    return aot_eager(graph, inputs)


def main(output: str, *names: str) -> None:
    torch.set_num_threads(1)
    backend.compile_inner = compile_inner
    dist.init_process_group("gloo")
    results = {}
    for name in names:
        torch.compiler.reset()
        results[name] = run(Case.parse(name))
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    dist.destroy_process_group()


def run(case: Case) -> dict[str, Any]:
    """Train `case` and return what rank 0 sees: losses of the whole batch, adapters, and what is
    fused."""
    model = model_of(case)
    step = ENGINES[case.engine](model)
    rank, size = dist.get_rank(), dist.get_world_size()
    losses = []
    for number in range(STEPS):
        rows = batch(number).tensor_split(size)[rank]
        loss = step(rows)
        dist.all_reduce(loss)
        losses.append(loss.item() / size)
    report = qlora_compile.explain(model)
    return {
        "losses": losses,
        "adapters": dict(_adapters(model)),
        "fused": report.fused,
        "unfused": sorted({str(site.reason) for site in report.sites if not site.fused}),
    }


def _adapters(model: Any) -> Iterator[tuple[str, list[float]]]:
    """Yield the trained tensors in full, flat, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = _whole(parameter)
            yield name, whole.flatten().tolist()


def _whole(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()


def _plain(model: Any, call: Any = None) -> Any:
    call = call or model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)

    def step(rows: torch.Tensor) -> torch.Tensor:
        loss = call(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _ddp(model: Any) -> Any:
    return _plain(model, torch.nn.parallel.DistributedDataParallel(model))


def _fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    return _plain(model)


def _accelerate(model: Any) -> Any:
    """Prepare the model by accelerate's FSDP2, which on a CPU has to be called by name."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.get_base_model().model.layers[0]).__name__],
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return _plain(fsdp2_prepare_model(accelerator, model))  # type: ignore[arg-type]


def _zero(stage: int) -> Any:
    def engine(model: Any) -> Any:
        import deepspeed  # pyright: ignore[reportMissingImports]

        trained = [p for p in model.parameters() if p.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,  # DeepSpeed's own is 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.SGD(trained, LEARNING_RATE)
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

        def step(rows: torch.Tensor) -> torch.Tensor:
            loss = wrapped(input_ids=rows, labels=rows).loss
            wrapped.backward(loss)
            wrapped.step()
            return loss.detach()

        return step

    return engine


ENGINES = {
    "none": _plain,
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "accelerate": _accelerate,
    "zero2": _zero(2),
    "zero3": _zero(3),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
