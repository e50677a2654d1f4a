"""Objectives of training: what is learnt from which rows, a file each."""
