"""`optimize` has the C++ of a first step built beforehand, in other threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_compile.kernels.cpu import instructions, toolchain

pytestmark = pytest.mark.skipif(
    not toolchain.has_compiler() or instructions.level() is None,
    reason="this CPU has no AVX2, or no C++ compiler",
)

PROGRAM = """
import json, sys, threading
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
import qlora_compile
from qlora_compile.kernels.cpu import background, toolchain

built = []
build = toolchain._built

def told(source, *others):
    built.append((threading.current_thread().name, source))
    return build(source, *others)

toolchain._built = told
config = LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=128,
)
model = LlamaForCausalLM(config).to(getattr(torch, sys.argv[1]))
model = qlora_compile.optimize(
    model, LoraConfig(r=4, target_modules="all-linear"), quantize=sys.argv[2], tune="off"
)
background.finish()
before = len(built)
ids = torch.arange(32)[None]
model.train()(input_ids=ids, labels=ids).loss.backward()
json.dump({"optimize": built[:before], "step": built[before:]}, sys.stdout)
"""


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("bfloat16", "nf4"), ("float32", "int8")], ids=["nf4", "int8"]
)
def test_a_first_step_waits_for_no_build(tmp_path: Path, dtype: str, quantize: str) -> None:
    folders = ("TORCHINDUCTOR_CACHE_DIR", "QLORA_COMPILE_CACHE")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype, quantize],
        env=os.environ | {name: str(tmp_path / name) for name in folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    sources = [source for _, source in built["optimize"]]
    assert len(sources) == len(set(sources)) > 2
    assert any(thread == "builds" for thread, _ in built["optimize"])
    late = [source for thread, source in built["step"] if thread != "builds"]
    assert not late, "".join(late)
