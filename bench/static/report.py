"""Writes the report, static.md: the gates, and a line for each kernel and target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import triton

from bench.static.figures import Figures
from bench.static.gates import Result
from bench.static.occupancy import limits
from bench.static.shipped import Row

PREFACE = """# Compiled kernels, read without a device

Every launch that is shipped, compiled ahead of time by Triton {version} and counted in the binary;
written by `make bench-static`. Nothing here is a speed. A line stands for all launches of a kernel
on a target, {launches} in all; `python -m bench.static.run --kernel fused_forward --arch sm_90`
prints each of them.

- *registers* (per thread), *shared* (memory of a CTA): the most of any launch. AMD's vector
  registers include its accumulation registers.
- *CTAs*: the fewest that fit on an SM (compute unit) at a time, by registers, shared memory and
  warps.
- *loads*, *stores*: bits per lane of accesses to global memory; a *tile* is copied by a tensor
  descriptor.
- *instructions*: of the kernel's first launch, the usual one: shares of the units that run them,
  loops counted once.
"""
MIX_SHARE = 0.05
"""Units with a smaller share of the instructions are left out."""


def markdown(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Return the report, with targets in the order of `rows`."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.arch), []).append(row)
    archs = list(dict.fromkeys(row.arch for row in rows))
    order = sorted(groups, key=lambda group: (group[0], archs.index(group[1])))
    columns = ("kernel", "target", "launches", "registers", "spills", "shared KiB", "CTAs")
    columns += ("tensor", "loads", "stores", "instructions")
    lines = ((*group, *_line(groups[group])) for group in order)
    preface = PREFACE.format(version=triton.__version__, launches=len(rows))
    return f"{preface}\n{_gates(results)}\n## Kernels\n\n{_table(columns, lines)}"


def describe(found: Figures, arch: str) -> str:
    """Return the figures of one launch as a paragraph."""
    taken, moved = found.resources, found.traffic
    parts = [
        f"registers {taken.registers}, spills {taken.spills}, stack {taken.stack_bytes} B,"
        f" shared {taken.shared_bytes / 1024:.1f} KiB, CTAs {found.ctas} {limits(taken, arch)}",
        f"loads {_widths(taken.loads)}, stores {_widths(taken.stores)}, tensor {taken.tensor}",
        f"{sum(taken.mix.values())} instructions {taken.mix}",
    ]
    if taken.scalars:
        parts.append(
            f"{taken.accumulators} accumulation registers, {taken.scalars} scalar registers,"
            f" {taken.parked_scalars} scalars in lanes of vector registers"
        )
    if moved:
        parts.append(f"moved {moved.moved} B, minimum {moved.minimum} B, wide {moved.wide}")
    return "\n    ".join(parts)


def _gates(results: Sequence[Result]) -> str:
    """Return a line per gate with a column per target, and the problems of gates not met."""
    archs = list(dict.fromkeys(result.arch for result in results))
    cells = {(result.gate, result.arch): _cell(result) for result in results}
    names = dict.fromkeys(result.gate for result in results)
    lines = ((name, *(cells[name, arch] for arch in archs)) for name in names)
    failed = [
        (result.gate, result.arch, launch, text)
        for result in results
        for launch, text in result.problems.items()
    ]
    text = f"## Gates\n\n{_table(('gate', *archs), lines)}"
    return text + ("\n" + _table(("not met", "target", "launch", "why"), failed) if failed else "")


def _cell(result: Result) -> str:
    if result.passed:
        return f"all {result.launches}"
    return f"**{len(result.problems)} of {result.launches} not**"


def _line(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the cells for all launches of a kernel on a target."""
    found = [row.figures for row in rows if row.figures]
    if not found:
        return (str(len(rows)), *[""] * 8)
    taken = [figures.resources for figures in found]
    return (
        str(len(rows)),
        str(max(each.registers for each in taken)),
        str(sum(each.spills for each in taken)),
        f"{max(each.shared_bytes for each in taken) / 1024:.1f}",
        str(min(figures.ctas for figures in found)),
        " ".join(sorted({opcode for each in taken for opcode in each.tensor})),
        _widths({bits: 0 for each in taken for bits in each.loads}),
        _widths({bits: 0 for each in taken for bits in each.stores}),
        _mix(taken[0].mix),
    )


def _mix(mix: Mapping[str, int]) -> str:
    total = sum(mix.values())
    shares = ((unit, count / total) for unit, count in Counter(mix).most_common())
    return ", ".join(f"{unit} {share:.0%}" for unit, share in shares if share >= MIX_SHARE)


def _widths(accesses: Mapping[int, int]) -> str:
    """Return widths in bits, each with its number of accesses unless that is 0."""
    return " ".join(
        f"{bits or 'tile'}{f'×{count}' if count else ''}"
        for bits, count in sorted(accesses.items(), reverse=True)
    )


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)
