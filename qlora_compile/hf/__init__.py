"""The edge to transformers, PEFT and datasets: only this folder imports them."""
