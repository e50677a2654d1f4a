"""Several processes by accelerate: accelerate launch --num-processes 2 examples/with_accelerate.py
MODEL. `accelerate config` chooses the engine: DDP, FSDP2 or DeepSpeed."""

import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import qlora_compile

accelerator = Accelerator()
torch.manual_seed(0)  # the same adapters in every process
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
lora = LoraConfig(r=16, target_modules="all-linear")
model = qlora_compile.optimize(model, lora, quantize="nf4").train()

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
tokens = torch.randint(0, 100, (12, 16))  # each process gets rows of its own
rows = DataLoader(list(tokens), batch_size=2)  # type: ignore[arg-type]
model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
for step, batch in enumerate(rows):
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}: loss {loss.item():.4f}")
accelerator.end_training()
