"""Quantised base layers of other libraries that are adopted where they stand, a file each."""
