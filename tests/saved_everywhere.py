"""Reads folders, with us or without, and writes their logits, in a separate process.

Arguments: "with" or "without" us, a file for the logits, and for each model: "load" by ours or
"stock" by transformers, the model's folder, and that of an adapter or "".
"""

from __future__ import annotations

import sys
from typing import Any

MODE, OUTPUT, *MODELS = sys.argv[1:]

if MODE == "with":
    import qlora_compile

    assert qlora_compile.__version__
    # Registered with transformers all the same, once that is imported.
    assert "transformers" not in sys.modules

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

logits = {}
for reader, folder, adapter in zip(*[iter(MODELS)] * 3, strict=True):
    if reader == "load":
        model: Any = sys.modules["qlora_compile"].load(folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    for module in model.modules():
        # On CPUs that multiply bfloat16, bitsandbytes would round absmax and inputs to it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        found = model.eval()(torch.arange(3, 35).view(2, 16)).logits
    logits[f"{reader} {folder} {adapter}"] = found
assert MODE == "with" or not any(name.startswith("qlora_compile") for name in sys.modules)
save_file(logits, OUTPUT)
