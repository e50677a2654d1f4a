"""Measures how far each format is from the weights it stores, and how fast it trains."""
