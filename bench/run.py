"""Trains the demo model by stock PEFT + bitsandbytes and by qlora_compile, steps in turn.

Weights, adapters, data and optimiser are the same. A second stock model gets each batch's rows in
reverse and computes attention unblocked, the same mathematics in another order of reduction, to
show how far two valid runs differ.
Then the trained adapter is loaded into stock PEFT, to see how far outputs and gradients of both are
from float32 on unseen text, and whether both write the same.
Prints the figures and writes them to bench/results/stock.json, one entry per dtype.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import qlora_compile
from bench.agreement import Errors, float32_twin, stock_twin, training_step
from bench.stock import with_bitsandbytes
from qlora_compile.hf import loading
from qlora_compile.training.demo import demo_model_file, docstring_documents
from qlora_compile.training.documents import pack, split

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNSEEN_BATCHES = 4
PROMPT, WRITTEN = 24, 24
"""Tokens given, and tokens to write after them."""


def batches(steps: int, batch_size: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return real text to train on and unseen text, because on random tokens a pretrained model
    amplifies rounding beyond use. Each batch is int64 [batch_size, length]."""
    tokenizer = loading.load_tokenizer(demo_model_file())

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    made = []
    for documents, count in zip(
        split(docstring_documents(), 0.05, 0), (steps, UNSEEN_BATCHES), strict=True
    ):
        wanted = count * batch_size
        sequences = pack(documents[: 40 * wanted], encode, tokenizer.eos_token_id, length)
        made.append(list(torch.tensor(sequences[:wanted]).view(count, batch_size, length)))
    return made[0], made[1]


def models(base: Any, rank: int) -> dict[str, Any]:
    """Return stock, stock once more, and ours, all with the same weights and adapters."""
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


def after_training(base: Any, ours: Any, unseen: list[Tensor]) -> dict[str, Any]:
    """Compare ours with stock PEFT with the adapter that ours has saved: errors against float32 per
    group, and for how many beginnings of unseen sequences both write the same. Leaves `ours` in
    float32."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        stock = stock_twin(base, Path(folder))
        exact = float32_twin(base, ours, Path(folder))
        writer = stock_twin(copy.deepcopy(base).float(), Path(folder))
    errors = Errors()
    for ids in unseen:
        errors.add(*(training_step(model, ids) for model in (ours, stock, exact)))
    # In bfloat16 rounding decides between near-equal tokens: there stock agrees with itself, one
    # prompt at a time and all at once, on half of them.
    prompts = torch.cat(unseen)[:, :PROMPT]
    written = [
        [
            model.generate(input_ids=row[None], max_new_tokens=WRITTEN, do_sample=False).tolist()
            for row in prompts
        ]
        for model in (ours.float().eval(), writer.eval())
    ]
    return {
        "errors": {
            group: {"ours": mine, "stock": theirs}
            for group, (mine, theirs) in errors.by_group().items()
        },
        "prompts": len(prompts),
        "written_the_same": sum(a == b for a, b in zip(*written, strict=True)),
    }


def step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> tuple[float, float]:
    """Return loss and seconds of one training step."""
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
    dtype: Annotated[
        Literal["native", "float32", "bfloat16"],
        typer.Option(help="Of the model; native: bfloat16 where the CPU multiplies it."),
    ] = "native",
) -> None:
    """Compare losses and step times with stock PEFT + bitsandbytes."""
    data, unseen = batches(steps, batch_size, length)
    base = loading.load_model(demo_model_file(), dtype=DTYPES.get(dtype))
    contenders = models(base, rank)
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=2e-4)
        for name, m in contenders.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    console = Console()
    for index, ids in enumerate(data):
        for name, model in contenders.items():
            reordered = name == "stock reordered"
            with sdpa_kernel(SDPBackend.MATH) if reordered else nullcontext():
                loss, duration = step(model, optimizers[name], ids.flip(0) if reordered else ids)
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
    trained = after_training(base, contenders["qlora_compile"], unseen)
    for group, pair in trained["errors"].items():
        console.print(
            f"error against float32, {group}: ours {pair['ours']:.2e}, stock {pair['stock']:.2e}"
        )
    console.print(
        f"the adapter in stock PEFT, in float32, writes the same {WRITTEN} tokens for "
        f"{trained['written_the_same']} of {trained['prompts']} prompts"
    )
    RESULTS.mkdir(exist_ok=True)
    results = {
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "batch": [batch_size, length],
        "rank": rank,
        "losses": losses,
        "seconds": seconds,
        "ratio": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]},
        "after_training": trained,
    }
    file = RESULTS / "stock.json"
    entries = json.loads(file.read_text()) if file.exists() else {}
    entries[str(base.dtype).removeprefix("torch.")] = results
    file.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
