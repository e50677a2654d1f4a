"""Several processes by FSDP2: torchrun --nproc-per-node 2 examples/fsdp2.py MODEL."""

import sys

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import qlora_compile

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", dist.get_node_local_rank())
    torch.cuda.set_device(device)
torch.manual_seed(0)  # the same adapters in every process
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
lora = LoraConfig(r=16, target_modules="all-linear")
model = qlora_compile.optimize(model, lora, quantize="nf4").to(device).train()
for layer in model.get_base_model().model.layers:
    fully_shard(layer)
fully_shard(model)

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
torch.manual_seed(dist.get_rank())  # other rows in every process
for step in range(3):
    tokens = torch.randint(0, 100, (2, 16), device=device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
dist.destroy_process_group()
