"""Quantisation formats: one file per format, listed in `qlora_compile.kernels.registry`."""
