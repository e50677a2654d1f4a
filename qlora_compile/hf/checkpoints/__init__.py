"""Quantised checkpoints read directly: one source and one file per library that writes them."""
