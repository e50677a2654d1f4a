"""Other libraries' tensors of one weight, made a PackedWeight without loss: one file per library.

Adopters of layers (`hf/bases`) and readers of checkpoints (`hf/checkpoints`) share them.
"""
