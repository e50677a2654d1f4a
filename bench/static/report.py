"""The report: static.md for readers, static.json with every figure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import triton

from bench.static.gates import Result
from bench.static.selection import (
    REDUCTION,
    SMALLEST_M_TILE,
    best,
    fastest,
    l2_need,
    output_cycles,
)
from bench.static.shipped import Row
from bench.static.sm_table import CARDS, COMPUTE_UNITS, CTA_STAGGER, MULTIPROCESSORS
from bench.static.targets import TARGETS

PREFACE = f"""# Compiled kernels, read without a device

Every launch that is shipped, compiled ahead of time and read; written by `make bench-static`.
Registers, spills, shared memory, instructions and access widths are **counted** in the binary.
Everything called **modelled** comes from a model of one SM that follows the binary's real control
words (stalls, scoreboards, barriers) with the rates of `bench/static/sm_table.py`; it was never
compared with a device, leaves out bank conflicts, L2 and DRAM traffic of the GEMMs, and is good
for ranking, not for promising speed. The consumer cards (sm_86, sm_89, sm_120) are modelled with
their halved bfloat16 rate. tcgen05, the tensor core of sm_100, and AMD's units are not modelled.

- *utilization*: share of the tensor cores' peak in the steady main loop, with as many CTAs as fit
  (at most 4); *alone*: with one CTA.
- *decode*: instructions per 8 decoded weights in the main loop. Everything that depends on loaded
  codes or scales, up to the tensor cores or shared memory, and what prepares constants for it;
  not the loads, not addresses, not synchronisation.
- *time*: modelled cycles of an SM for 128 x 128 elements of the output at K = {REDUCTION}, from a
  CTA's first instruction to its last, of the fastest launch at each rank.
- *L2 need*: what the card's second-level cache would have to deliver for the modelled pace, its
  bandwidth not being part of the model: above what it has, the kernel is slower than modelled.
- *registers*: per thread. AMD's vector registers include its accumulation registers (acc); parked
  scalars are kept in lanes of vector registers, which costs moves and no memory.
- *moved*: bytes of all 128-bit accesses and of all stores, plus each remaining byte once, over the
  bytes of all tensors.
"""
KERNELS = ("fused_forward", "fused_backward", "tail_forward", "tail_backward")


def markdown(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """The readable report; rows and results in the order given."""
    archs = list(dict.fromkeys(row.arch for row in rows))
    parts = [PREFACE, f"Triton {triton.__version__}; {len(rows)} launches.\n", _gates(results)]
    parts.append(_summary(rows, archs))
    parts += [_architecture(arch, [row for row in rows if row.arch == arch]) for arch in archs]
    return "\n".join(parts)


def as_json(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """All figures. What a machine adds, the time that compiling took, is left out."""
    record = {
        "triton": triton.__version__,
        "modelled": ["utilization", "traffic.bounds"],
        "model": {name: dataclasses.asdict(sm) for name, sm in MULTIPROCESSORS.items()},
        "cards": {name: dataclasses.asdict(card) for name, card in CARDS.items()},
        "cta_stagger": CTA_STAGGER,
        "gates": [
            {"gate": result.gate, "arch": result.arch, **dataclasses.asdict(result.verdict)}
            for result in results
        ],
        "launches": [_record(row) for row in rows],
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _record(row: Row) -> dict[str, Any]:
    record = dataclasses.asdict(row)
    if figures := record["figures"]:
        del figures["seconds"]
    return _rounded(record)


def _rounded(value: Any) -> Any:
    """Four digits after the point: more would say that the model is sure."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value


def _gates(results: Sequence[Result]) -> str:
    """A line per gate with a column per target, and what is behind each gate that is not met."""
    archs = list(dict.fromkeys(result.arch for result in results))
    names = list(dict.fromkeys(result.gate for result in results))
    cells: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        cells.setdefault((result.gate, result.arch), []).append(result)
    failed = [result for result in results if not result.verdict.passed]
    head = f"## Gates\n\n{len(results) - len(failed)} met, {len(failed)} not met (in bold).\n"
    lines = ((name, *(_cell(cells.get((name, arch), [])) for arch in archs)) for name in names)
    table = _table(("gate", *archs), lines)
    if failed:
        table += "\n" + _table(
            ("not met", "target", "value", "limit", "launch"),
            ((r.gate, r.arch, r.verdict.value, r.verdict.limit, r.verdict.launch) for r in failed),
        )
    return f"{head}\n{table}"


def _cell(results: Sequence[Result]) -> str:
    failed = [result for result in results if not result.verdict.passed]
    if failed:
        return f"**{len(failed)} not met**" if len(failed) > 1 else f"**{failed[0].verdict.value}**"
    return "; ".join(result.verdict.value for result in results)


def _summary(rows: Sequence[Row], archs: Sequence[str]) -> str:
    """The best launch of each GEMM per architecture, singly and doubly quantised."""
    lines = []
    for arch in archs:
        here = [row for row in rows if row.arch == arch]
        for kernel in KERNELS:
            for double in (False, True):
                chosen = best(here, kernel, double_quantized=double)
                if chosen:
                    lines.append(_summary_line(here, chosen))
    head = f"## Best launch of each kernel (bfloat16, NF4, BM ≥ {SMALLEST_M_TILE}; modelled)\n"
    columns = ("target", "kernel", "config", "absmax", "decoder", "registers", "CTAs")
    columns += ("utilization", "alone", "decode", "time r=0", "r=16", "r=64", "L2 need / has, TB/s")
    return f"{head}\n{_table(columns, lines)}"


def _summary_line(rows: Sequence[Row], chosen: Row) -> tuple[str, ...]:
    figures = chosen.figures
    assert figures is not None
    assert figures.utilization is not None
    times = [
        fastest(rows, chosen.kernel, rank, double_quantized=chosen.double_quantized)
        for rank in (0, 16, 64)
    ]
    cycles = [output_cycles(row) * 128 * 128 if row else None for row in times]
    without = cycles[0]
    return (
        chosen.arch,
        chosen.kernel,
        chosen.config,
        "uint8" if chosen.double_quantized else "float32" if chosen.decoder else "",
        chosen.decoder,
        str(figures.resources.registers),
        str(figures.ctas),
        f"{figures.utilization.tensor:.3f}",
        f"{figures.utilization.alone:.3f}",
        f"{figures.decode_instructions:.1f}" if figures.decode else "",
        f"{without:.0f}" if without else "",
        *(f"{time / without - 1:+.1%}" if time and without else "" for time in cycles[1:]),
        "; ".join(
            f"{name} {l2_need(chosen, card) / 1e12:.1f} / {card.l2_bandwidth / 1e12:.1f}"
            for name, card in CARDS.items()
            if card.arch == chosen.arch
        ),
    )


def _architecture(arch: str, rows: Sequence[Row]) -> str:
    cards = ", ".join(name for name, card in CARDS.items() if card.arch == arch)
    target = TARGETS[arch]
    head = f"## {arch}{f' ({cards})' if cards else ''}, {target.backend}\n"
    columns = ("launch", "registers", "spills", "shared KiB", "CTAs", "tensor", "loads", "stores")
    columns += ("loop", "utilization", "alone", "decode", "moved", "SM / DRAM cycles")
    return f"{head}\n{_table(columns, (_line(row) for row in rows))}"


def _line(row: Row) -> tuple[str, ...]:
    found = row.figures
    if found is None:
        return (row.name, f"**{row.error}**", *[""] * 12)
    taken, use, moved = found.resources, found.utilization, found.traffic
    registers = f"{taken.registers}"
    if row.arch in COMPUTE_UNITS:
        registers += f" ({taken.accumulators} acc), {taken.scalars} scalar"
    if taken.parked_scalars:
        registers += f" ({taken.parked_scalars} parked)"
    return (
        row.name,
        registers,
        str(taken.spills) if not taken.stack_bytes else f"{taken.spills} ({taken.stack_bytes} B)",
        f"{taken.shared_bytes / 1024:.1f}",
        str(found.ctas),
        " ".join(f"{name}×{count}" for name, count in sorted(taken.tensor.items())),
        _widths(taken.loads),
        _widths(taken.stores),
        str(found.loop_instructions or ""),
        f"{use.tensor:.3f}" if use else "not modelled" if found.loop and row.tile else "",
        f"{use.alone:.3f}" if use else "",
        f"{found.decode_instructions:.1f}" if found.decode else "",
        f"{moved.excess:+.1%}" if moved else "",
        "; ".join(
            f"{name} {bound.sm_cycles:.0f} / {bound.dram_cycles:.0f}"
            for name, bound in (moved.bounds.items() if moved else ())
        ),
    )


def _widths(accesses: Mapping[int, int]) -> str:
    """Accesses by bits per lane; those of a tensor descriptor have no lanes."""
    return " ".join(
        f"{bits or 'tile'}×{count}" for bits, count in sorted(accesses.items(), reverse=True)
    )


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)
