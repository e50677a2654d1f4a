"""Who may import whom: read from the sources, and for `import qlora_compile` tried out."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "qlora_compile"
LONGEST_FILE = 320

ORDER = (
    ("errors", "json_text"),
    (
        *("adapter_errors", "checkpoint_errors", "data_errors", "expert_errors", "row_errors"),
        *("saving_errors", "training_errors", "kernels", "outputs", "text_table", "registration"),
    ),
    ("passes", "tuning"),
    ("modules",),
    ("hf",),
    ("weight_reads", "chosen"),
    ("sites",),
    ("quantizer",),
    ("verify",),
    ("capture",),
    ("adopt", "early_builds"),
    ("report",),
    ("api",),
    ("trainers", "training", "build"),
    ("merging",),
    ("quantized_lora",),
    ("cli",),
)
"""Every module and folder of ours, from the ground up: each imports what stands before it, and
itself. The passes know of the kernels only what stands in a graph."""

KERNELS_OF_PASSES = (
    *("call", "layout", "linear_call", "op", "problem", "registry"),
    *("experts", "attention"),
)


def _layers() -> dict[str, tuple[str, ...]]:
    """Return what each layer may import of ours."""
    below: tuple[str, ...] = ()
    layers = {}
    for level in ORDER:
        layers |= {name: (*below, name) for name in level}
        below += level
    layers["passes"] = ("errors", "passes", *(f"kernels.{name}" for name in KERNELS_OF_PASSES))
    return layers


LAYERS = _layers()
HUGGING_FACE = {"accelerate", "bitsandbytes", "datasets", "peft", "transformers", "trl"}


def _sources() -> dict[str, Path]:
    """Return module name below qlora_compile -> file; kernels and passes where they really lie."""
    modules = {}
    for folder in (ROOT / PACKAGE, ROOT / "kernels", ROOT / "passes"):
        base = folder if folder.name == PACKAGE else ROOT
        for path in folder.rglob("*.py"):
            if path.resolve() == path:
                name = ".".join(path.relative_to(base).with_suffix("").parts)
                modules[name.removesuffix("__init__").removesuffix(".")] = path
    return modules


SOURCES = _sources()


def _within(module: str, layer: str) -> bool:
    return module == layer or module.startswith(f"{layer}.")


def _imports(module: str) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of everything `module` imports at run time, inside functions
    too."""
    path = SOURCES[module]
    package = [PACKAGE, *module.split(".")]
    if path.stem != "__init__":
        package.pop()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                known = submodule.removeprefix(f"{PACKAGE}.") in SOURCES
                yield node.lineno, submodule if known else source


IMPORTS = [
    (module, line, name) for module in sorted(SOURCES) for line, name in sorted(_imports(module))
]
TRITON_FILES = {module for module, _, name in IMPORTS if _within(name, "triton")}


def _ours(name: str) -> str | None:
    """Return the name below qlora_compile ("" for the package itself); None for someone else's."""
    return name[len(PACKAGE) + 1 :] if _within(name, PACKAGE) else None


def _listed(violations: list[tuple[str, int, str]]) -> str:
    return "\n".join(
        f"{SOURCES[module].relative_to(ROOT)}:{line} imports {name}"
        for module, line, name in violations
    )


def test_every_module_has_a_layer():
    assert {module.split(".")[0] for module in SOURCES if module} == LAYERS.keys()


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_imports_only_what_lies_below(layer):
    violations = [
        (module, line, name)
        for module, line, name in IMPORTS
        if _within(module, layer)
        and (ours := _ours(name))
        and not any(_within(ours, allowed) for allowed in LAYERS[layer])
    ]
    assert not violations, _listed(violations)


def test_only_hf_imports_hugging_face_libraries():
    violations = [
        (module, line, name)
        for module, line, name in IMPORTS
        if name.split(".")[0] in HUGGING_FACE and not _within(module, "hf")
    ]
    assert not violations, _listed(violations)


@pytest.mark.parametrize("layer", ["passes", "hf"])
def test_layer_stays_clear_of_triton(layer):
    violations = [
        (module, line, name)
        for module, line, name in IMPORTS
        if _within(module, layer) and (_within(name, "triton") or _ours(name) in TRITON_FILES)
    ]
    assert not violations, _listed(violations)


def test_hf_does_not_import_passes():
    violations = [
        (module, line, name)
        for module, line, name in IMPORTS
        if _within(module, "hf") and _within(_ours(name) or "", "passes")
    ]
    assert not violations, _listed(violations)


def test_no_file_is_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def test_import_loads_no_triton_and_touches_no_gpu():
    code = f"""
import sys, torch
before = set(sys.modules)
import {PACKAGE}
assert not torch.cuda.is_initialized()
print(*set(sys.modules) - before)
"""
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    triton_files = {f"{PACKAGE}.{module}" for module in TRITON_FILES}
    assert not [name for name in loaded if _within(name, "triton") or name in triton_files]
