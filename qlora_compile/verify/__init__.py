"""Checking rewritten graphs against what they were captured from."""
