"""Reads folders, with us or without, and writes their logits, in a separate process.

Arguments: "load" (by `qlora_compile.load`), "with" or "without" us (by transformers), a file for
the logits, and for each model its folder and that of an adapter, or "".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

MODE, OUTPUT, *FOLDERS = sys.argv[1:]

if MODE != "without":
    import qlora_compile

    assert qlora_compile.__version__
    # Registered with transformers all the same, once that is imported.
    assert "transformers" not in sys.modules

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

logits = {}
for folder, adapter in zip(FOLDERS[::2], FOLDERS[1::2], strict=True):
    if MODE == "load":
        model: Any = sys.modules["qlora_compile"].load(folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(Path(folder))
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found = model.eval()(torch.arange(3, 35).view(2, 16)).logits
    logits[f"{folder} {adapter}"] = found
assert MODE != "without" or not any(name.startswith("qlora_compile") for name in sys.modules)
save_file(logits, OUTPUT)
