"""Several processes by Ray Train, one for each GPU: python examples/with_ray.py MODEL WORKERS."""

import sys
from typing import Any

import ray.train.torch
import torch
from peft import LoraConfig
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import qlora_compile


def train(settings: dict[str, Any]) -> None:
    """Train in one process; Ray has set up torch.distributed."""
    device = ray.train.torch.get_device()
    torch.manual_seed(0)  # the same adapters in every process
    model = AutoModelForCausalLM.from_pretrained(settings["model"]).to(device)
    lora = LoraConfig(r=16, target_modules="all-linear")
    model = qlora_compile.optimize(model, lora, quantize="nf4").train()
    model = DistributedDataParallel(model)

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    torch.manual_seed(ray.train.get_context().get_world_rank())  # other rows in every process
    for step in range(3):
        tokens = torch.randint(0, 100, (2, 16)).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ray.train.report({"step": step, "loss": loss.item()})


if __name__ == "__main__":
    workers = ScalingConfig(num_workers=int(sys.argv[2]), use_gpu=torch.cuda.is_available())
    trainer = TorchTrainer(train, train_loop_config={"model": sys.argv[1]}, scaling_config=workers)
    print(trainer.fit().metrics)
