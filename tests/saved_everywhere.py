"""Run in a process of its own: reads a folder, with us or without, and prints its logits.

Arguments: "with" or "without", the folder, an adapter's folder or "", and the file for the logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

MODE, FOLDER, ADAPTER, OUTPUT = sys.argv[1:]

if MODE == "with":
    import qlora_compile

    assert qlora_compile.__version__
    # Registered with transformers all the same, once that is imported.
    assert "transformers" not in sys.modules

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

model = AutoModelForCausalLM.from_pretrained(Path(FOLDER))
if ADAPTER:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, ADAPTER)
with torch.no_grad():
    logits = model.eval()(torch.arange(3, 35).view(2, 16)).logits
assert MODE == "with" or not any(name.startswith("qlora_compile") for name in sys.modules)
save_file({"logits": logits}, OUTPUT)
