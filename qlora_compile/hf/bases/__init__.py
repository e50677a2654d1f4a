"""Quantised layers of other libraries, adopted in place: one adopter and one file per library."""
