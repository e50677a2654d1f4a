"""Pages that are written while the documentation is built, from the registries they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "reference" / "generated"


def write() -> None:
    """Write commands.md and formats.md into `FOLDER`."""
    FOLDER.mkdir(exist_ok=True)
    pages = {"commands.md": commands(), "formats.md": formats()}
    for name, text in pages.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def commands() -> str:
    """Every command with its options, as `--help` prints them."""
    import typer
    from typer.cli import get_docs_for_click

    from qlora_compile.cli.app import app

    command: Any = typer.main.get_command(app)
    for each in command.commands.values():
        each.short_help = " ".join(each.help.split())  # or else the list of commands cuts it
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="qlora-compile")
    return text.replace("# `qlora-compile`", "# Commands", 1)


def formats() -> str:
    """Every format with its options, from the registry."""
    from qlora_compile.kernels.formats.formats import FORMATS

    lines = [
        "# Formats",
        "",
        "Give a name to `optimize(quantize=…)` and options as keywords. On the command line, write",
        "`--format int4:group_size=128,zeros=float`. In bold is what `optimize` takes if you do",
        "not give the option.",
        "",
        "| Format | Bits of a code | Option | Values |",
        "|---|---|---|---|",
    ]
    for each in FORMATS:
        label = f"`{each.name}` | {each.bits}"
        for option in each.options:
            lines.append(f"| {label} | `{option.name}` | {_values(each, option)} |")
            label = " | "
        if not each.options:
            lines.append(f"| {label} | none | |")
    return "\n".join(lines) + "\n"


def _values(quant_format: Any, option: Any) -> str:
    """List the values of `option`, with the one that `optimize` takes by itself in bold.

    That may not be the option's own default: `optimize` quantises scales twice where it can.
    """
    layout = quant_format.usual_layout((64, 64))
    usual = layout.named.get(option.name, option.default)
    if option.allowed is not None:
        return f"{option.allowed}: **`{usual!r}`**"
    return ", ".join(
        f"**`{value!r}`**" if value == usual else f"`{value!r}`" for value in option.values
    )
