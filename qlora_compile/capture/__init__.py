"""Captures blocks with torch.compile and rewrites their graphs."""
