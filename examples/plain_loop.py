"""Train by hand: MODEL. Prints the report, and the loss of each step."""

import sys

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_compile

STEPS = 3
TEXT = "the quick brown fox jumps over the lazy dog"

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
model = qlora_compile.optimize(model, lora, quantize="nf4").train()

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
batch = tokenizer(TEXT, return_tensors="pt")
for step in range(STEPS):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
print(qlora_compile.explain(model))
