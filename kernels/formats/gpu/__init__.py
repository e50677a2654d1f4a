"""How the shipped formats are decoded in Triton kernels."""
