"""Attention over a KV cache in pages."""
