"""The kinds of gate: each is given the rows of one architecture and judges them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.static.selection import best, candidates, fastest, output_cycles
from bench.static.shipped import Row
from bench.static.targets import is_nvidia

TENSOR_DTYPES = ("bfloat16", "float16")
WIDE = 128


@dataclass(frozen=True)
class Verdict:
    """value, limit: as text, with the unit. launch: which one decided."""

    passed: bool
    value: str
    limit: str
    launch: str


Judge = Callable[[str, Sequence[Row]], Iterator[Verdict]]


def compiles(_: str, rows: Sequence[Row]) -> Iterator[Verdict]:
    yield from _every(rows, lambda row: row.error, "no error")


def never_spills(_: str, rows: Sequence[Row]) -> Iterator[Verdict]:
    yield from _every(rows, _spill, "no spill, no stack")


def control_words_agree(_: str, rows: Sequence[Row]) -> Iterator[Verdict]:
    yield from _every(rows, _misread, "every late operand is waited for")


def uses_tensor_cores(_: str, rows: Sequence[Row]) -> Iterator[Verdict]:
    yield from _every(rows, _without_tensor_cores, "present")


def fits(_: str, rows: Sequence[Row]) -> Iterator[Verdict]:
    yield from _every(rows, _too_large, "at least one CTA per SM")


def utilization_of(kernel: str, minimum: Mapping[str, float]) -> Judge:
    """*Modelled* use of the tensor cores by the best launch."""

    def judge(arch: str, rows: Sequence[Row]) -> Iterator[Verdict]:
        limit = f"≥ {minimum[arch]:.2f}"
        yield _of_best(rows, kernel, limit, lambda use: use >= minimum[arch])

    return judge


def utilization_near(kernel: str, reference: str, margin: float) -> Judge:
    """The same, at most `margin` below that of the kernel `reference`."""

    def judge(_: str, rows: Sequence[Row]) -> Iterator[Verdict]:
        other = best(rows, reference)
        if other is None:
            yield Verdict(False, "nothing to compare with", f"≥ {reference} less {margin}", "")
            return
        least = _tensor(other) - margin
        yield _of_best(rows, kernel, f"≥ {least:.3f}", lambda use: use >= least)

    return judge


def adapter_costs(kernel: str, rank: int, most: float) -> Judge:
    """*Modelled* time of the whole kernel with an adapter of `rank`, over that without: the fastest
    launch of each, singly and doubly quantised apart."""

    def judge(_: str, rows: Sequence[Row]) -> Iterator[Verdict]:
        limit = f"≤ {most:+.1%}"
        judged = False
        for double in (False, True):
            with_adapter = fastest(rows, kernel, rank, double_quantized=double)
            without = fastest(rows, kernel, 0, double_quantized=double)
            if with_adapter and without:
                judged = True
                cost = output_cycles(with_adapter) / output_cycles(without) - 1
                yield Verdict(cost <= most, f"{cost:+.1%}", limit, with_adapter.name)
        if not judged:
            yield Verdict(False, f"not shipped at rank {rank} and rank 0", limit, "")

    return judge


def decode_instructions(kernel: str, most: Mapping[str, float]) -> Judge:
    """Instructions per eight decoded weights, copies between registers included, in the shortest
    main loop among the launches that `best` chooses from: every decoder is exact."""

    def judge(arch: str, rows: Sequence[Row]) -> Iterator[Verdict]:
        limit = f"≤ {most[arch]:.0f}"
        counted = [
            (row.figures.decode_instructions, row.name)
            for row in candidates(rows, kernel)
            if row.figures and row.figures.decode
        ]
        if not counted:
            yield Verdict(False, "no launch that decodes", limit, "")
            return
        count, name = min(counted)
        yield Verdict(count <= most[arch], f"{count:.1f}", limit, name)

    return judge


def moves_the_minimum(kernel: str, excess: float) -> Judge:
    """Bytes against the minimum, wide accesses, and DRAM as the *modelled* bound; on AMD, whose
    traffic is not modelled, wide accesses alone."""

    def judge(arch: str, rows: Sequence[Row]) -> Iterator[Verdict]:
        chosen = [row for row in rows if row.kernel == kernel]
        limit = f"bytes within {excess:.0%}, {WIDE} bits wide, DRAM-bound"
        if not is_nvidia(arch):
            yield from _every(chosen, _narrow, f"{WIDE} bits wide")
            return
        yield from _every(chosen, lambda row: _wasteful(row, excess), limit)

    return judge


def _every(
    rows: Sequence[Row], problem: Callable[[Row], str | None], limit: str
) -> Iterator[Verdict]:
    """One verdict for each row with a problem, or one for all."""
    wrong = [(row, text) for row in rows if (text := problem(row))]
    for row, text in wrong:
        yield Verdict(False, text, limit, row.name)
    if not wrong:
        yield Verdict(bool(rows), f"all {len(rows)}", limit, "all")


def _of_best(
    rows: Sequence[Row], kernel: str, limit: str, good: Callable[[float], bool]
) -> Verdict:
    chosen = best(rows, kernel)
    if chosen is None:
        return Verdict(False, "no such launch shipped", limit, "")
    use = _tensor(chosen)
    return Verdict(good(use), f"{use:.3f}", limit, chosen.name)


def _tensor(row: Row) -> float:
    assert row.figures is not None
    assert row.figures.utilization is not None
    return row.figures.utilization.tensor


def _spill(row: Row) -> str | None:
    if row.figures is None or not row.figures.resources.spilled:
        return None
    taken = row.figures.resources
    return f"{taken.spills} spill instructions, {taken.stack_bytes} bytes of stack"


def _misread(row: Row) -> str | None:
    if row.figures is None or not row.figures.unguarded:
        return None
    return f"{row.figures.unguarded} instructions run too early"


def _without_tensor_cores(row: Row) -> str | None:
    if row.figures is None or row.tile is None or row.dtype not in TENSOR_DTYPES:
        return None
    return None if row.figures.resources.tensor else "no tensor-core instruction"


def _too_large(row: Row) -> str | None:
    if row.figures is None or row.figures.ctas:
        return None
    taken = row.figures.resources
    return f"{taken.registers} registers × {taken.warps} warps, {taken.shared_bytes} shared bytes"


def _narrow(row: Row) -> str | None:
    if row.figures is None:
        return None
    taken = row.figures.resources
    if WIDE not in taken.loads or set(taken.stores) != {WIDE}:
        return f"loads {taken.loads}, stores {taken.stores}"
    return None


def _wasteful(row: Row, excess: float) -> str | None:
    if row.figures is None:
        return None
    moved = row.figures.traffic
    if moved is None:
        return "it has a loop: its bytes cannot be counted"
    found = []
    if abs(moved.excess) > excess:
        found.append(f"bytes {moved.excess:+.1%}")
    if not moved.wide:
        taken = row.figures.resources
        found.append(f"loads {taken.loads}, stores {taken.stores}")
    found += [
        f"{card}: SM {bound.sm_cycles:.0f} cycles, DRAM {bound.dram_cycles:.0f}"
        for card, bound in moved.bounds.items()
        if not bound.dram_bound
    ]
    return "; ".join(found) or None
