"""The edge to transformers, PEFT and datasets, which only this folder imports."""
