"""Train by TRL's SFTTrainer: MODEL CHATS. The trainer attaches adapters; one line optimises."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import qlora_compile

on_gpu = torch.cuda.is_available()
settings = SFTConfig(
    "out", max_steps=3, per_device_train_batch_size=2, bf16=on_gpu, report_to="none"
)
rows = load_dataset("json", data_files=sys.argv[2], split="train")
trainer = SFTTrainer(
    model=sys.argv[1],
    args=settings,
    train_dataset=rows,
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
)
qlora_compile.optimize_trainer(trainer, quantize="nf4")
trainer.train()
trainer.save_model("out/adapter")
