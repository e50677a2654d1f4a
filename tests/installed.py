"""Install the wheel of dist/ into a bare virtual environment, and train a step there.

`make test-wheel` runs this file. torch and the other dependencies are those of the environment
that runs it: a .pth file puts their folder on the bare environment's path. Python does not read the
.pth files in that folder, so the editable installation of the repository is not found through it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]

TRAINED = """
import sys
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_compile
from qlora_compile.capture import backend

# Inductor's part has nothing to do with the wheel, and takes g++ most of a minute.
backend.compile_inner = lambda graph, inputs, *_: graph.forward
assert qlora_compile.__file__.startswith(sys.prefix), qlora_compile.__file__
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
lora = LoraConfig(r=4, target_modules="all-linear")
model = qlora_compile.optimize(LlamaForCausalLM(config), lora, quantize="nf4", tune="model").train()
tokens = torch.arange(32)[None]
model(input_ids=tokens, labels=tokens).loss.backward()
report = qlora_compile.explain(model)
print(report.fused, "of", len(report.sites), "fused")
assert report.fused == 7
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""


def main() -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        python = bare_environment(Path(folder, "bare"), wheel)
        # -I: neither PYTHONPATH nor the current folder may lead to the repository.
        said = subprocess.run(
            [python, "-I", python.with_name("qlora-compile"), "--version"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        print(wheel.name, "says", said.stdout.strip())
        assert f"-{said.stdout.strip()}-" in wheel.name
        subprocess.run([python, "-I", "-c", TRAINED], cwd=folder, check=True)


def bare_environment(folder: Path, wheel: Path) -> Path:
    """Make a virtual environment with `wheel` and what this one has; return its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    # --ignore-installed: where PYTHONPATH leads to the repository, pip takes that for installed.
    offline = ["--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, "install", *offline, wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


if __name__ == "__main__":
    main()
