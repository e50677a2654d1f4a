"""Pack while loading, save packed, load packed: MODEL."""

import sys

import torch
from transformers import AutoModelForCausalLM

import qlora_compile

packing = qlora_compile.QloraCompileConfig("nf4")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=packing)
qlora_compile.save(model, "packed", stored_as="qlora_compile")
again = qlora_compile.load("packed", dtype=model.dtype)

tokens = torch.arange(8)[None]
with torch.no_grad():
    assert torch.equal(model(tokens).logits, again(tokens).logits)
print("the packed folder gives equal logits")
