"""Merging adapters into the dequantised base, tensor by tensor."""
