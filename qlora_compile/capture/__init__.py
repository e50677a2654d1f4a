"""Capturing blocks with torch.compile and rewriting their graphs."""
