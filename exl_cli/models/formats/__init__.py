"""Readers of quantized weight formats: packed tensors in, float tensors out."""
