"""The demo model through stock PEFT + bitsandbytes and through qlora_compile, steps in turn.

Same weights, adapters, data and optimiser. A second stock model sees each batch's rows in reverse
order: the same mathematics in another order of reduction, which is how far two valid runs differ.
Prints the losses and the ratio of the step times, and writes both to bench/results/stock.json.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

import qlora_compile
from bench.stock import with_bitsandbytes
from qlora_compile.demo import demo_model_file, docstring_documents
from qlora_compile.documents import pack, split
from qlora_compile.hf import loading

RESULTS = Path(__file__).parent / "results"


def batches(steps: int, batch_size: int, length: int) -> list[torch.Tensor]:
    """Real text: on random tokens a pretrained model amplifies rounding beyond use."""
    tokenizer = loading.load_tokenizer(demo_model_file())
    documents, _ = split(docstring_documents(), 0.05, 0)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    wanted = steps * batch_size
    sequences = pack(documents[: 40 * wanted], encode, tokenizer.eos_token_id, length)[:wanted]
    return list(torch.tensor(sequences).view(steps, batch_size, length))


def models(rank: int) -> dict[str, Any]:
    """Stock, stock once more, and ours, all from the same weights and adapters."""
    base = loading.load_model(demo_model_file())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    made = {}
    for name in ("stock", "stock reordered", "qlora_compile"):
        model = copy.deepcopy(base)
        ours = name == "qlora_compile"
        if not ours:
            with_bitsandbytes(model, 4)
        torch.manual_seed(0)  # of the adapters' initialisation
        model = (
            qlora_compile.optimize(model, config, quantize="nf4")
            if ours
            else get_peft_model(model, config)
        )
        made[name] = model.train()
    return made


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[float, float]:
    """Loss and seconds of one training step."""
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach()), time.perf_counter() - start


def main(
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
) -> None:
    """Compare losses and step times with stock PEFT + bitsandbytes."""
    data = batches(steps, batch_size, length)
    contenders = models(rank)
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=2e-4)
        for name, m in contenders.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    console = Console()
    for index, ids in enumerate(data):
        for name, model in contenders.items():
            rows = ids.flip(0) if name == "stock reordered" else ids
            loss, duration = step(model, optimizers[name], rows)
            losses[name].append(loss)
            seconds[name].append(duration)
        console.print(
            f"step {index + 1}: "
            + ", ".join(f"{n} {losses[n][-1]:.6f} {seconds[n][-1]:.2f} s" for n in contenders)
        )
    differences = {
        name: [abs(a - b) for a, b in zip(losses[name], losses["stock"], strict=True)]
        for name in ("stock reordered", "qlora_compile")
    }
    # The first step compiles; each later one is compared with stock's on the same batch.
    ratios = [
        ours / stock
        for ours, stock in zip(seconds["qlora_compile"][1:], seconds["stock"][1:], strict=True)
    ]
    report = qlora_compile.explain(contenders["qlora_compile"])
    table = Table("", "largest loss difference to stock", "mean", "median step s", "first step s")
    for name in contenders:
        gaps = differences.get(name, [0.0])
        table.add_row(
            name,
            f"{max(gaps):.2e}",
            f"{statistics.mean(gaps):.2e}",
            f"{statistics.median(seconds[name][1:]):.2f}",
            f"{seconds[name][0]:.2f}",
        )
    console.print(table)
    quartiles = statistics.quantiles(ratios, n=4)
    console.print(
        f"step time, ours / stock on the same batch: median {quartiles[1]:.3f}, "
        f"quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}; "
        f"{report.fused} of {len(report.sites)} linears fused"
    )
    RESULTS.mkdir(exist_ok=True)
    results = {
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "dtype": str(contenders["stock"].dtype),
        "batch": [batch_size, length],
        "rank": rank,
        "losses": losses,
        "seconds": seconds,
        "ratio": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]},
    }
    (RESULTS / "stock.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
