"""Sizes so small that computing takes next to nothing beside the host's part of a step."""

# From 16 positions on, the gradients of torch's attention take half a millisecond on a CPU.
BATCH, LENGTH, VOCABULARY, RANK = 4, 8, 64, 16
HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, EXPERTS = 128, 256, 4, 2, 8
