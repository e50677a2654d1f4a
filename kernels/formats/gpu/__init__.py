"""Triton functions that decode the shipped formats in kernels."""
