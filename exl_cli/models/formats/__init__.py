"""Weight formats: safetensors headers, and EXL2 and GPTQ dequantization in torch."""
