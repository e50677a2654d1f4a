"""Sizes so small that computing takes next to nothing beside the host's part of a step."""

BATCH, LENGTH, VOCABULARY, RANK = 2, 16, 64, 16
HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, EXPERTS = 128, 256, 4, 2, 8
