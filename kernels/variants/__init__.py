"""Implementations of the fused linear: one file per variant, listed in the registry."""
