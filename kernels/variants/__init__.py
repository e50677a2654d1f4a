"""Variants of the fused linear: one file each, listed in the registry."""
