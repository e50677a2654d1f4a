"""Kinds of folders that a packed model is saved in: one file each, in a literal tuple."""
