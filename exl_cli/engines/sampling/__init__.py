"""The sampler, in NumPy: logits to next token."""
