"""Only kernels/formats names formats, as read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_compile.kernels.formats.formats import FORMATS

ROOT = Path(__file__).parents[1]
NAMES = {quant_format.name for quant_format in FORMATS}
KNOWS_FORMATS = (
    "kernels/formats/",
    *(f"qlora_compile/hf/{folder}/" for folder in ("bases", "checkpoints", "packings")),
    "qlora_compile/hf/saving/folders/",
)
"""All but the first make formats of what other libraries store, or the other way round."""
DEFAULT = "qlora_compile/training/model_choice.py"
"""Where the command line's one default stands."""


def _sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield path below the repository and syntax tree."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if path.resolve() == path and not name.startswith(KNOWS_FORMATS):
                yield name, ast.parse(path.read_text())


PACKAGE = dict(_sources("kernels", "passes", "qlora_compile"))


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_source_names_a_format() -> None:
    found = {path: NAMES & set(_strings(tree)) for path, tree in PACKAGE.items()}
    assert found.pop(DEFAULT) == {FORMATS[0].name}
    assert {path: names for path, names in found.items() if names} == {}


def test_no_source_knows_the_planes_of_a_format() -> None:
    planes = {
        plane.name
        for quant_format in FORMATS
        for plane in quant_format.planes(quant_format.usual_layout((64, 64)))[1:]
    }
    assert "absmax" in planes
    # Words that mean something else, too.
    for path, tree in PACKAGE.items():
        for node in ast.walk(tree):
            words = {getattr(node, field, None) for field in ("id", "attr", "arg", "name")}
            known = (planes - {"scales", "zeros"}) & {w for w in words if isinstance(w, str)}
            assert not known, f"{path}:{getattr(node, 'lineno', '?')} knows {known}"
        assert "absmax" not in ast.dump(tree).lower(), path


def test_no_source_counts_planes() -> None:
    for path, tree in PACKAGE.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "len":
                assert "planes" not in ast.unparse(node), f"{path}:{node.lineno} counts planes"


def _lists(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield lists and the like whose members are constants, and the keys of dicts."""
    for node in ast.walk(tree):
        members: list[ast.expr | None] = []
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            members = [*node.elts]
        elif isinstance(node, ast.Dict):
            members = [*node.keys]
        values = [member.value for member in members if isinstance(member, ast.Constant)]
        if len(NAMES & {value for value in values if isinstance(value, str)}) > 1:
            assert isinstance(node, ast.expr)
            yield node


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_no_test_lists_formats(folder: str) -> None:
    """It ranges over FORMATS instead, so that a new format is tested, too."""
    for path, tree in _sources(folder):
        for node in _lists(tree):
            raise AssertionError(f"{path}:{node.lineno} lists formats: {ast.unparse(node)}")
