"""Train by transformers' Trainer: MODEL ROWS, where each row of the .jsonl has a text."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import qlora_compile

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama's base models have none
rows = load_dataset("json", data_files=sys.argv[2], split="train")
rows = rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])

lora = LoraConfig(r=16, target_modules="all-linear")
model = qlora_compile.optimize(model, lora, quantize="int8")
trainer = Trainer(
    model=model,
    args=TrainingArguments("out", max_steps=3, per_device_train_batch_size=2, report_to="none"),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
model.save_pretrained("out/adapter")
