"""`optimize` has the C++ of a first step built beforehand, in other threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile import early_builds
from qlora_compile.kernels.cpu import instructions, toolchain
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.formats import FORMATS

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
model = LlamaForCausalLM(config).to(torch.bfloat16)
model = qlora_compile.optimize(
    model, LoraConfig(r=4, target_modules="all-linear"), quantize=sys.argv[1], tune="off"
)
background.finish()
before = len(built)
ids = torch.arange(32)[None]
model.train()(input_ids=ids, labels=ids).loss.backward()
json.dump({"optimize": built[:before], "step": built[before:]}, sys.stdout)
"""


def test_a_first_step_waits_for_no_build(tmp_path: Path) -> None:
    folders = ("TORCHINDUCTOR_CACHE_DIR", "QLORA_COMPILE_CACHE")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, FORMATS[0].name],
        env=os.environ | {name: str(tmp_path / name) for name in folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    sources = [source for _, source in built["optimize"]]
    assert len(sources) == len(set(sources)) > 3
    assert any(thread == "builds" for thread, _ in built["optimize"])
    late = [source for thread, source in built["step"] if thread != "builds"]
    assert not late, "".join(late)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_sample_builds_what_real_weights_need(
    fmt: QuantFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: set[str] = set()
    compiled = toolchain._compiled

    def told(source: str, *others: Any) -> Any:
        built.add(source)
        return compiled(source, *others)

    monkeypatch.setattr(toolchain, "_compiled", told)
    early_builds._decode_sample(dtype, fmt.name, {})
    early = set(built)
    for shape in ((96, 1024), (512, 2048)):
        packed = fmt.quantize(torch.randn(shape))
        for _ in fmt.decoded(packed, dtype, 64):
            pass
    assert built == early


def test_groups_that_do_not_divide_the_sample_are_left_to_the_weights() -> None:
    grouped = [fmt for fmt in FORMATS if any(o.name == "group_size" for o in fmt.options)]
    assert grouped
    for fmt in grouped:
        early_builds._decode_sample(torch.float32, fmt.name, {"group_size": 48})
