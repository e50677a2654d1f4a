"""Every code block that a reader may paste runs, page by page, or says why no test can run it."""

import ast
import importlib
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from qlora_compile.cli.app import app
from tests.docs.blocks import PAGES, ROOT, Block, blocks
from tests.docs.workplace import fill
from tests.test_equality import as_rewritten

__all__ = ["as_rewritten"]

REASONS = {
    "CUDA",
    "network",
    "minutes",
    "several processes",
    "vLLM",
    "llama.cpp",
    "Ollama",
    "Slurm",
    "Ray",
}
NOT_CODE = {"", "text", "{eval-rst}", "{toctree}", "json", "yaml"}

# Inductor's code and AOTAutograd's are run by other tests.
pytestmark = pytest.mark.usefixtures("as_rewritten")

RUN = [page for page in PAGES if any(block.language in ("python", "sh") for block in blocks(page))]


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    fill(folder)
    return folder


@pytest.fixture
def workplace(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder with the models and the data that the pages name."""
    for path in filled.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("workplace")
def test_a_page_runs_from_top_to_bottom(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            code = _compiled(block)
            if block.reason is None:
                exec(code, names)
        elif block.language == "sh":
            for command in _commands(block):
                _shell(command, run=block.reason is None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_has_a_known_language_and_reason(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language in {"python", "sh", *NOT_CODE}, where
        assert block.reason is None or block.reason in REASONS, where


def _compiled(block: Block) -> Any:
    """Return the compiled code of `block`, after a check of its imports of ours."""
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_compile"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, each.name) for each in node.names), ast.unparse(node)
    # Padded, so that a traceback names the line of the page.
    return compile("\n" * block.line + block.text, str(block.page), "exec")


def _commands(block: Block) -> list[list[str]]:
    joined = block.text.replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in joined.splitlines())
    return [words for words in lines if words]


def _shell(words: list[str], *, run: bool) -> None:
    """Run a command of ours; check a command that is not run for its options or its target."""
    if words[0] == "qlora-compile":
        if run:
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, result.output
        else:
            parse(words[1:])
    elif words[0] == "torchrun" and not run:
        given = get_args_parser().parse_args(words[1:])
        assert given.training_script == "qlora-compile"
        parse(given.training_script_args)
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
    else:
        assert not run, f"{words[0]} is not ours: mark the block as not run"


def parse(words: list[str]) -> None:
    """Raise click's error if an option or a command of ours does not exist."""
    command: Any = typer.main.get_command(app)
    context = click.Context(command)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        context = click.Context(command, info_name=name, parent=context)
    command.parse_args(context, list(words))
