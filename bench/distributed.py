"""Measures what sharding costs: a step under FSDP2 in two processes beside one in one process.

Each is divided by stock's, PEFT over bitsandbytes, whose steps are taken in turn with ours. Prints
the figures and writes bench/results/distributed.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

import qlora_compile
from bench.allocations import allocations
from bench.measured_on import in_words, measured_on
from bench.paired import interval_of_median
from bench.random_model import random_model
from bench.stock import with_bitsandbytes

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "distributed.md"
PROCESSES, STEPS, WARM = 2, 20, 2
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, TOKENS, RANK = 4, 1024, 2816, 256, 128, 16
OURS, STOCK = "ours", "stock"


def build(name: str) -> Any:
    """Return a model in training, of random weights in NF4 with adapters on all Linears."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
    )
    model = random_model(config).to(torch.float32)
    lora = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    if name == STOCK:
        return get_peft_model(with_bitsandbytes(model, 4), lora).train()
    return qlora_compile.optimize(model, lora, quantize="nf4", tune="model").train()


def shard(model: Any) -> Any:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def step_of(model: Any) -> Callable[[], None]:
    """Return a function that takes one step of training on TOKENS tokens."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.arange(TOKENS)[None] * 7 % VOCABULARY

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def race(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Return the seconds of STEPS steps of each, in turn, each time beginning with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM + STEPS):
        for name in sorted(steps, reverse=number % 2 == 1):
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: found[WARM:] for name, found in seconds.items()}


def stored(model: Any) -> int:
    """Return the bytes that this process keeps of the model between steps."""
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            held += [state.absmax, state.code, state.state2.absmax, state.state2.code]
    local = [each.to_local() if isinstance(each, DTensor) else each for each in held]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in local}
    return sum(each.nbytes() for each in storages.values())


def worker(output: Path) -> None:
    """One rank: both models in two processes, then in the first one alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"sharded": _measured(sharded=True)}
    if dist.get_rank() == 0:
        found["single"] = _measured(sharded=False)
        output.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _measured(*, sharded: bool) -> dict[str, Any]:
    models = {name: build(name) for name in (OURS, STOCK)}
    if sharded:
        models = {name: shard(model) for name, model in models.items()}
    steps = {name: step_of(model) for name, model in models.items()}
    seconds = race(steps)
    return {
        "seconds": seconds,
        "stored": {name: stored(model) for name, model in models.items()},
        "most": {name: allocations(step, warm=False).most for name, step in steps.items()},
    }


def ratios(found: dict[str, Any]) -> list[float]:
    """Return ours / stock of every pair of steps."""
    pairs = zip(found["seconds"][OURS], found["seconds"][STOCK], strict=True)
    return [ours / stock for ours, stock in pairs]


def report(found: dict[str, Any]) -> str:
    single, sharded = (ratios(found[each]) for each in ("single", "sharded"))
    lines = [
        *("# Several processes", ""),
        f"By `make bench-distributed`: {in_words(found)};",
        f"one thread a process, {PROCESSES} processes by gloo.",
        f"A Llama of {LAYERS} blocks, hidden {HIDDEN}, float32, NF4, rank {RANK} on all linears,",
        f"{TOKENS} tokens a process. Ours / stock: our step by that of PEFT + bitsandbytes,",
        f"{STEPS} pairs in turn; median and its 95 % interval. FSDP2: `fully_shard` of all blocks,",
        "then of the model. Kept: bytes of the model in a process between steps, ours and stock's.",
        "Most: what a step holds beyond these, gloo's own copies included.",
        *("", "| | ours / stock | ours s | stock s | kept MB | most MB |"),
        "|---|---|---|---|---|---|",
    ]
    for title, key, each in (("one process", "single", single), ("FSDP2", "sharded", sharded)):
        low, high = interval_of_median(each)
        entry = found[key]
        ours, stock = (statistics.median(entry["seconds"][name]) for name in (OURS, STOCK))
        kept, most = (
            " and ".join(f"{entry[what][name] / 1e6:.1f}" for name in (OURS, STOCK))
            for what in ("stored", "most")
        )
        lines.append(
            f"| {title} | {statistics.median(each):.3f} ({low:.3f} to {high:.3f}) | {ours:.3f} | "
            f"{stock:.3f} | {kept} | {most} |"
        )
    quotient = statistics.median(sharded) / statistics.median(single)
    lines += ["", f"The ratio under FSDP2 is {quotient:.3f} times that of one process.", ""]
    return "\n".join(lines)


def main(
    write: Annotated[bool, typer.Option(help="Write bench/results/distributed.md.")] = True,
) -> None:
    """Time steps under FSDP2 and in one process, ours beside stock's."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "found.json")
        command = ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(PROCESSES), "-m", "bench.distributed"]
        variables = os.environ | {"BENCH_DISTRIBUTED_OUTPUT": str(output)}
        subprocess.run([sys.executable, *command], cwd=ROOT, env=variables, check=True)
        found = {**measured_on(), **json.loads(output.read_text())}
    typer.echo(report(found))
    if write:
        RESULT.write_text(report(found))


if __name__ == "__main__":
    if "RANK" in os.environ:
        worker(Path(os.environ["BENCH_DISTRIBUTED_OUTPUT"]))
    else:
        typer.run(main)
