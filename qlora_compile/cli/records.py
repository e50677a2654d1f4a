"""The command line's `records`: lists, shows, checks, exports, merges and prunes choices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.tune import parse_budget
from qlora_compile.text_table import text_table

if TYPE_CHECKING:
    from qlora_compile.tuning.fingerprint import Fingerprint
    from qlora_compile.tuning.record import Record
    from qlora_compile.tuning.store import RecordStore
    from qlora_compile.tuning.timings import Timing

records = typer.Typer(
    name="records",
    help="What was measured, in $QLORA_COMPILE_CACHE or the user's cache folder.",
    no_args_is_help=True,
)

_KEY_DIGITS = 8
_COLUMNS = ("key", "valid", "ms", "× dense", "× second", "fastest", "problem")


@records.command("list")
def list_records() -> None:
    """Show every record, and whether it is valid on this machine as it is now."""
    with bad_input_in_one_line():
        store = _store()
        found = store.read()
        if not found:
            typer.echo(f"no records in {store.folder}")
            return
        from qlora_compile.tuning.fingerprint import fingerprints_here
        from qlora_compile.tuning.record import key_digest

        here = fingerprints_here()
        ordered = sorted(found.items(), key=lambda item: str(item[1].problem))
        rows = [(key_digest(key)[:_KEY_DIGITS], *_cells(r, here)) for key, r in ordered]
    typer.echo("\n".join(text_table(_COLUMNS, rows)))
    typer.echo(f"\n{len(rows)} records in {store.folder}; valid: on this machine as it is now")


@records.command()
def show(
    key: Annotated[str, typer.Argument(help="A record's key, or enough of its first digits.")],
) -> None:
    """Show everything one record holds."""
    with bad_input_in_one_line():
        digest, record = _chosen(_store(), key)
    typer.echo(f"key {digest}\n{as_text(record)}")


@records.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Files that `export` wrote.")],
) -> None:
    """Take over the records of other files; of two with one key, keep the one measured later."""
    with bad_input_in_one_line():
        store = _store()
        count = store.merge(files)
    typer.echo(f"{count} records taken over into {store.folder}")


@records.command()
def export(
    file: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    all: Annotated[bool, typer.Option("--all", help="Other machines' records too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write this machine's records that are still valid to one file that can be shipped."""
    with bad_input_in_one_line():
        count = _store().export(file, None if all else _fingerprints(), overwrite=overwrite)
    typer.echo(f"{count} records in {file}")


@records.command()
def prune() -> None:
    """Remove unreadable lines, and records of other kernels, another torch or another Triton."""
    with bad_input_in_one_line():
        store = _store()
        count = store.prune(_fingerprints())
    typer.echo(f"{count} lines removed from {store.folder}")


@records.command()
def check(
    budget: Annotated[str, typer.Option("--budget", help="Time to spend: 120s, 5m.")] = "120s",
) -> None:
    """Measure this machine's records that are still valid again, and say what changed."""
    with bad_input_in_one_line():
        seconds = parse_budget(budget)
        store = _store()
        from qlora_compile.tuning.caution import CAREFUL
        from qlora_compile.tuning.cpu_figures import checked_cpu
        from qlora_compile.tuning.recheck import recheck
        from qlora_compile.tuning.record import key_digest

        figures = checked_cpu(store.folder, CAREFUL)
        if figures.busy:
            typer.echo("the CPU's figures: not measured, because the machine was busy")
        elif figures.model is not None:
            changed = [
                f"{name} now {factor:.2g} times as large"
                for name, factor in figures.changed.items()
            ]
            typer.echo(f"the CPU's figures: {', '.join(changed) or 'the same'}")
        rechecked = recheck(
            store,
            seconds,
            lambda each: typer.echo(
                f"{key_digest(each.before.key)[:_KEY_DIGITS]}  {each.before.problem}: {each}"
            ),
        )
    measured = sum(each.after is not None for each in rechecked)
    changed = sum(each.changed for each in rechecked)
    typer.echo(
        f"{len(rechecked)} records of this machine in {store.folder}: {measured} measured again, "
        f"{changed} changed"
    )


def as_text(record: Record) -> str:
    """Return everything that a record holds, one fact per line."""
    from dataclasses import fields

    lines = [f"measured at {record.measured_at}"]
    for title, part in (("problem", record.problem), ("fingerprint", record.fingerprint)):
        lines.append(title)
        facts = {field.name: getattr(part, field.name) for field in fields(part)}
        if part is record.fingerprint:
            facts["kernels"] = ", ".join(map(" ".join, record.fingerprint.kernels))
        lines += [f"  {name}: {value}" for name, value in facts.items()]
    lines.append("load: other work on the machine")
    load = {field.name: getattr(record.load, field.name) for field in fields(record.load)}
    lines += [f"  {name}: {_number(value)}" for name, value in load.items()]
    lines.append("timings: median, interquartile range")
    lines += [f"  {_timed(timing)}" for timing in record.timings]
    if record.baseline is not None:
        lines.append(f"baseline\n  {_timed(record.baseline)}")
    second = "none" if record.margin is None else f"{record.margin:.3f} times"
    gain = "none" if record.gain is None else f"{record.gain:.3f} times"
    lines.append(f"fastest against dense: {gain}, against the second: {second}")
    if record.advantage is not None:
        found = record.advantage
        interval = f"{found.low:.3f} to {found.high:.3f} times, {found.rounds} rounds"
        lines.append(f"fastest against the cost model's choice, {found.over}: {interval}")
    lines.append("rejected" if record.rejected else "rejected: none")
    lines += [f"  {candidate}: {reason}" for candidate, reason in record.rejected]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"


def _timed(timing: Timing) -> str:
    milliseconds = f"{timing.seconds * 1e3:.4f} ms, {timing.spread * 1e3:.4f} ms"
    return f"{timing.variant} {timing.config}: {milliseconds}"


def _cells(record: Record, here: set[Fingerprint]) -> tuple[Any, ...]:
    return (
        "yes" if any(each.covers(record.fingerprint) for each in here) else "no",
        f"{record.winner.seconds * 1e3:.4f}",
        record.gain and f"{record.gain:.2f}",
        record.margin and f"{record.margin:.2f}",
        f"{record.winner.variant} {record.winner.config}",
        str(record.problem),
    )


def _store() -> RecordStore:
    from qlora_compile.tuning.cache_folder import cache_folder
    from qlora_compile.tuning.store import RecordStore

    return RecordStore(cache_folder())


def _fingerprints() -> set[Fingerprint]:
    """Return this machine's fingerprints. Raises FingerprintError if the CPU has none."""
    from qlora_compile.tuning.fingerprint import established, fingerprints_here

    return {established("cpu"), *fingerprints_here()}


def _chosen(store: RecordStore, prefix: str) -> tuple[str, Record]:
    """Return the key and the record whose key starts with `prefix`.

    Raises RecordKeyError if there is none, or more than one.
    """
    from qlora_compile.tuning.errors import RecordKeyError
    from qlora_compile.tuning.record import key_digest

    digests = {key_digest(key): record for key, record in store.read().items()}
    matching = [digest for digest in digests if digest.startswith(prefix.lower())]
    if not matching:
        raise RecordKeyError(value=prefix, problem="no key starts with these digits")
    if len(matching) > 1:
        problem = f"{len(matching)} keys start with these digits; pass more of them"
        raise RecordKeyError(value=prefix, problem=problem)
    return matching[0], digests[matching[0]]
