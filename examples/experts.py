"""A mixture of experts: MODEL, whose experts transformers holds as tensors of three dimensions."""

import sys

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import qlora_compile

lora = LoraConfig(
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = qlora_compile.optimize(model, lora, quantize="int4", group_size=32).train()
tokens = torch.arange(16)[None]
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
report = qlora_compile.explain(model)
weights = [site for site in report.sites if site.experts]
print(f"loss {loss.item():.4f}; {sum(site.fused for site in weights)} of {len(weights)} fused")
