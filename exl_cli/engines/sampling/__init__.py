"""From logits to the next token, in NumPy."""
