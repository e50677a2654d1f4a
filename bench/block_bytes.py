"""Bytes of one compiled Llama decoder block's training step, ours and stock's PEFT + bitsandbytes.

Both go through torch.compile with Inductor, forward and backward; adapters of rank 16 on all seven
Linears over NF4. The numbers come from Inductor's scheduler after fusion, and from what autograd
holds:

- written: every buffer that Inductor's own kernels or a fallback operator write, except GEMM-like
  operators: matrix products, attention, bitsandbytes' gemm_4bit and our fused op. Their results are
  counted separately ("gemm"), and so are decoded weights ("decoded"), which stock's backward writes
  by an operator of its own, and ours inside the op. Casts, additions, clones, dropouts, scalings,
  norms and activations around them all count.
- saved: the distinct storages that the compiled forward keeps for its backward, without parameters
  and the tensors of packed weights.
- inside: what the GEMM-like ops of bitsandbytes and of ours allocate while they run, beside their
  results: decoded weights, casts, low-rank products. Nearly all of it is freed before they return,
  or is a workspace that the next call uses again.

Prints the table and writes bench/results/block_bytes.{md,json}.
"""

# Attributes of modules and options of configs are not as typed.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

import qlora_compile
from bench.allocations import allocation_sizes, event_tree
from bench.random_model import random_model
from bench.stock import with_bitsandbytes

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH, RANK = 2, 256, 16
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
GEMM_LIKE = ("mm", "addmm", "bmm", "baddbmm", "gemm_4bit", "gemv_4bit")
OURS = "qlora_compile::"
DECODING = ("dequantize_4bit", "dequantize_blockwise")


class Setting(NamedTuple):
    adapter: torch.dtype
    dropout: float

    def __str__(self) -> str:
        return f"{str(self.adapter).removeprefix('torch.')}, {self.dropout}"


SETTINGS = [Setting(a, p) for a in (torch.float32, torch.bfloat16) for p in (0.0, 0.05)]


def block_bytes(setting: Setting, ours: bool) -> tuple[Counter[str], Counter[str]]:
    """The bytes by kind, and those written by each non-GEMM kernel's origins."""
    model = _model(setting, ours)
    block = model.get_base_model().model.layers[0]
    if not ours:
        block.compile(fullgraph=True)
    hidden = torch.randn(BATCH, LENGTH, SHAPE["hidden_size"], dtype=torch.bfloat16)
    hidden.requires_grad_()
    positions = torch.arange(LENGTH)[None]
    rotary = model.get_base_model().model.rotary_emb(hidden, positions)

    def step() -> Any:
        out = block(hidden.clone(), position_embeddings=rotary)
        return out[0] if isinstance(out, tuple) else out

    kinds, origins = Counter[str](), Counter[str]()

    def count(nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        for node in nodes:
            for kind, size in _written(node):
                kinds[kind] += size
                if kind == "written":
                    origins[_origins(node)] += size
        return nodes

    with inductor_config.patch(_post_fusion_custom_pass=count, force_disable_caches=True):
        step().sum().backward()
    kinds["saved"] = _saved(step(), model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step().sum().backward()
    kinds["inside"] = _inside(profiler)
    if ours:
        report = qlora_compile.explain(model)
        assert report.fused == 7, str(report)
    return kinds, origins


def _model(setting: Setting, ours: bool) -> Any:
    model = random_model(LlamaConfig(vocab_size=64, num_hidden_layers=1, **SHAPE))
    lora = LoraConfig(r=RANK, lora_dropout=setting.dropout, target_modules="all-linear")
    if ours:
        model = qlora_compile.optimize(model, lora, quantize="nf4", tune="model")
    else:
        model = get_peft_model(with_bitsandbytes(model, 4), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(setting.adapter)
    return model.train()


def _written(node: BaseSchedulerNode) -> Iterator[tuple[str, int]]:
    """Yield kind and bytes of each buffer that a kernel writes, without buffers inside it."""
    own = {each.get_name() for each in node.get_nodes()}
    for each in node.get_nodes():
        kind = "written"
        if isinstance(each, ExternKernelSchedulerNode):
            kind = _kind(each.node)
        elif each.is_extern() or type(each).__name__ == "NopKernelSchedulerNode":
            continue
        for buffer in each.get_outputs():
            layout = buffer.node.get_output_spec()
            users = [user for user in buffer.users if not user.is_weak]
            if isinstance(layout, ir.Layout) and any(u.get_name() not in own for u in users):
                size = torch.Size(map(int, layout.size)).numel() * layout.dtype.itemsize
                yield kind, size


def _kind(kernel: Any) -> str:
    if isinstance(kernel, ir.MultiOutput):
        kernel = kernel.inputs[0]
    overload = getattr(kernel, "op_overload", None)
    name = overload._schema.name if overload is not None else str(kernel.python_kernel_name)
    leaf = name.rpartition("::")[2].rpartition(".")[2]
    if name.startswith(OURS) or leaf in GEMM_LIKE or "scaled_dot_product" in leaf:
        return "gemm"
    return "decoded" if leaf in DECODING else "written"


def _origins(node: BaseSchedulerNode) -> str:
    """Names of the graph's operations that a kernel computes."""
    names = [o.name for each in node.get_nodes() for o in getattr(each.node, "origins", ())]
    return " ".join(sorted({name.rstrip("_0123456789") for name in names}))


def _saved(out: Tensor, model: nn.Module) -> int:
    context: Any = out.grad_fn
    assert type(context).__name__ == "CompiledFunctionBackward", context
    lasting = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for each in (state, getattr(state, "state2", None)):
            lasting += [v for v in vars(each).values() if isinstance(v, Tensor)] if each else []
    known = {tensor.untyped_storage().data_ptr() for tensor in lasting}
    saved = (*context.saved_tensors, *context._tensors_no_vc_check)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def _inside(profiler: Any) -> int:
    """Return the bytes of all allocations in the library's ops, except the last, the results."""
    total = 0
    pending = event_tree(profiler)
    while pending:
        event = pending.pop()
        if not event.name.startswith((OURS, "bitsandbytes::gem")):
            pending += event.children
            continue
        sizes = list(allocation_sizes(event.children))
        total += sum(size for size in sizes if size > 0) - max(sum(sizes), 0)
    return total


KINDS = ("written", "saved", "gemm", "decoded", "inside")


def main() -> None:
    """Count the bytes and compare them with stock's."""
    console = Console()
    header = ["adapters, dropout", *(f"{k} {side}" for k in KINDS for side in ("stock", "ours"))]
    rows = [[*header, "written ratio", "saved ratio"], ["---"] + ["---:"] * (len(header) + 1)]
    results: dict[str, Any] = {}
    for setting in SETTINGS:
        entry: dict[str, Any] = {}
        for side in ("stock", "ours"):
            kinds, origins = block_bytes(setting, side == "ours")
            entry[side] = {kind: kinds[kind] for kind in KINDS} | {
                "largest written": origins.most_common(12)
            }
            torch._dynamo.reset()
        cells = [entry[side][kind] / 1e6 for kind in KINDS for side in ("stock", "ours")]
        for kind in ("written", "saved"):
            entry[f"{kind} ratio"] = entry["ours"][kind] / entry["stock"][kind]
            cells.append(entry[f"{kind} ratio"])
        results[str(setting)] = entry
        rows.append(
            [str(setting), *(f"{cell:.{1 if i < 10 else 2}f}" for i, cell in enumerate(cells))]
        )
        console.print(", ".join(map(" ".join, zip(rows[0], rows[-1], strict=True))))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    description = f"MB of 10⁶ bytes; {BATCH} x {LENGTH} tokens, rank {RANK}, bfloat16 model."
    (RESULTS / "block_bytes.md").write_text(
        f"{description} What is counted: bench/block_bytes.py.\n\n{table}\n"
    )
    (RESULTS / "block_bytes.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
