"""Checks rewritten graphs against the captured ones."""
