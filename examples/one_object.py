"""One object: MODEL CHATS. Trains, asks, and writes a merged model."""

import sys

from qlora_compile import QuantizedLoRA

q = QuantizedLoRA(sys.argv[1], rank=16, quantization_bits=4)
q.train(sys.argv[2], max_steps=3)
print(q.generate([{"role": "user", "content": "what jumps?"}], max_new_tokens=8))
q.save("adapter")
print(q.merge("merged"))
